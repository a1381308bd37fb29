"""LoRA of the fused weights of experts, which PEFT names by the module that holds them (`target_parameters`).

In memory all experts' matrices are one tensor; in files they may be one, or one for each expert and part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

from tasks.core.errors import BadModel
from tasks.deltas.lazy_tensors import AddedExperts
from tasks.deltas.peft_config import Settings
from tasks.models.safetensors_reader import StoredTensor, TensorSource

_PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""The fused weights, and what their parts are called in files."""

_OUT_BY_IN = frozenset(
    ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "olmoe", "granitemoe", "glm4_moe")
)
_IN_BY_OUT = frozenset(("gpt_oss", "llama4", "llama4_text"))
"""Families whose experts' matrices are (out, in), and (in, out): square ones do not tell by themselves."""


class Fused(NamedTuple):
    """One update of the experts of a module.

    Attributes:
        module: its name, without PEFT's marks.
        a: (experts * rank, in).
        b: (out, rank * experts).
        family: the base's model_type.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    family: str

    def changes(self, base: Mapping[str, StoredTensor], settings: Settings) -> list[tuple[str, TensorSource]]:
        """Return the weights of the base that it changes, with what takes their place.

        Raises:
            BadModel: its shapes or its rank fit none of the module's weights, or more than one.
        """
        targets = [target for target in settings.target_parameters or () if _holds(self.module, target)]
        found = [each for target in targets if (each := self._of(target.rpartition(".")[2], base, settings))]
        if len(found) != 1:
            raise BadModel(
                "does not fit this base",
                where=self.module,
                got=f"updates of shapes {self.a.shape} and {self.b.shape}, which fit {len(found)} of its weights",
                fix="use the base that the adapter was trained on",
            )
        return found[0]

    def _of(
        self, parameter: str, base: Mapping[str, StoredTensor], settings: Settings
    ) -> list[tuple[str, TensorSource]]:
        name = f"{self.module}.{parameter}"
        rank, scale = settings.rank(name), settings.scale(name)
        experts, wanted = self.a.shape[0] // rank, (self.b.shape[0], self.a.shape[1])
        if experts * rank != self.a.shape[0] or self.b.shape[1] != self.a.shape[0]:
            return []
        if name in base:
            shape = base[name].shape
            turned = self._turned(shape)
            fits = shape == (experts, *(wanted[::-1] if turned else wanted))
            return [(name, AddedExperts(base[name], self.a, self.b, experts, scale, turned))] if fits else []
        return list(self._apart(parameter, base, experts, scale, wanted))

    def _turned(self, shape: tuple[int, ...]) -> bool:
        """Return whether an expert's matrix is (in, out)."""
        if self.family in _OUT_BY_IN | _IN_BY_OUT or len(shape) != 3:
            return self.family in _IN_BY_OUT
        if shape[-1] == shape[-2]:
            raise BadModel(
                "has square experts, of which it is not known here which way they lie",
                where=self.module,
                got=self.family or "no model_type",
                expected=", ".join(sorted(_OUT_BY_IN | _IN_BY_OUT)),
            )
        return shape[-2:] == (self.a.shape[1], self.b.shape[0])

    def _apart(
        self, parameter: str, base: Mapping[str, StoredTensor], experts: int, scale: float, wanted: tuple[int, int]
    ) -> Iterator[tuple[str, TensorSource]]:
        parts = _PARTS.get(parameter, ())
        names = [[_name_of(self.module, expert, part, base) for part in parts] for expert in range(experts)]
        more = [_name_of(self.module, experts, part, base) for part in parts]
        if not parts or any(more) or not all(name for each in names for name in each):
            return
        heights = [base[name].shape[0] for name in names[0]]
        if (sum(heights), base[names[0][0]].shape[1]) != wanted:
            return
        for expert, number in product(range(experts), range(len(parts))):
            name, before = names[expert][number], sum(heights[:number])
            yield name, AddedExperts(base[name], self.a, self.b, experts, scale, first=expert, rows_from=before)


def fused_weights(base: Mapping[str, StoredTensor], settings: Settings) -> set[str]:
    """Return the weights of a base that the configuration wants changed by their own names."""
    found = set()
    for target in settings.target_parameters or ():
        module, _, parameter = target.rpartition(".")
        parts = "|".join(name for part in _PARTS.get(parameter, ()) for name in part) or "-"
        places = "|".join(re.escape(each) for each in _places(module)) if module else r"[^.]*experts[^.]*"
        apart = re.compile(rf"(.*\.)?({places})\.\d+\.({parts})\.weight")
        found |= {name for name in base if f".{name}".endswith(f".{target}") or apart.fullmatch(name)}
    return found


def _holds(module: str, target: str) -> bool:
    """Return whether a parameter that is targeted, by its own name or with its module's, may be of this module."""
    place = target.rpartition(".")[0]
    return not place or f".{module}".endswith(f".{place}")


def _places(module: str) -> tuple[str, str]:
    """Return a module's name in memory, and the one that files may know it by (Mixtral)."""
    return module, re.sub(r"(^|\.)mlp(\.|$)", r"\1block_sparse_moe\2", module)


def _name_of(module: str, expert: int, part: tuple[str, ...], base: Mapping[str, StoredTensor]) -> str:
    names = (f"{each}.{expert}.{name}.weight" for each in _places(module) for name in part)
    return next((name for name in names if name in base), "")
