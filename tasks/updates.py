"""What a published adapter does to the weights of its base: for each weight's name a function of that weight.

The functions take and give float32 tensors; who writes the result rounds it once. Names are the base's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tasks.adapter_files import CONFIG, WEIGHTS
from tasks.errors import BadModel

if TYPE_CHECKING:
    from torch import Tensor

Change: TypeAlias = "Callable[[Tensor], Tensor]"

_ROUNDING = 1e-5
"""PEFT adds it to the rank that AdaLoRA's updates are divided by."""


def changes_of(adapter: Path) -> dict[str, Change]:
    """What the adapter in a folder, or the model that is there instead, does to each weight.

    Raises:
        BadModel: it is of a method that does not change weights.
    """
    if not (adapter / CONFIG).is_file():
        return {name: _become(weight) for shard in sorted(adapter.glob("*.safetensors")) for name, weight in _of(shard)}
    config = json.loads((adapter / CONFIG).read_text())
    tensors = dict(_of(adapter / WEIGHTS))
    kind = config["peft_type"]
    if kind not in _CHANGES:
        raise BadModel(
            "is of a method that cannot be merged", where=str(adapter / CONFIG), got=kind, expected=", ".join(_CHANGES)
        )
    return _CHANGES[kind](config, tensors)


def _of(shard: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for name, tensor in load_file(shard).items():
        yield name.removeprefix("base_model.model."), tensor.float()


def _lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """W + s B A, where s is alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA (arXiv:2312.03732).

    DoRA (arXiv:2402.09353) then gives each row the norm that it learnt.
    """
    changes = {}
    for mark in (".lora_A.weight", ".lora_embedding_A"):
        for name in (name for name in tensors if name.endswith(mark)):
            module = name.removesuffix(mark)
            a, b = tensors[name], tensors[name.replace("_A", "_B")]
            rank = a.shape[0]
            alpha = _own(config["alpha_pattern"], module, config["lora_alpha"])
            update = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * (b @ a)
            lies = config["fan_in_fan_out"] or mark == ".lora_embedding_A"
            changes[f"{module}.weight"] = _add(update, lies, tensors.get(f"{module}.lora_magnitude_vector"))
    return changes


def _own(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value for a module: of the pattern that names it, as PEFT reads patterns, or of all others."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns.keys(), module), otherwise)


def _adalora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """W + s P Λ Q, where s is alpha / the rank in the beginning."""
    changes = {}
    for name in (name for name in tensors if name.endswith(".lora_A")):
        module = name.removesuffix(".lora_A")
        right, singular, left = (tensors[f"{module}.lora_{part}"] for part in "AEB")
        update = left @ (right * singular) * config["lora_alpha"] / (config["init_r"] + _ROUNDING)
        changes[f"{module}.weight"] = _add(update, config["fan_in_fan_out"])
    return changes


def _ia3(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """W with its rows scaled, for outputs, (out, 1), or its columns, for inputs, (1, in); biases with the outputs."""
    changes = {}
    for name, factors in tensors.items():
        module = name.removesuffix(".ia3_l")
        changes[f"{module}.weight"] = _scale(factors.T if config["fan_in_fan_out"] else factors)
        if factors.shape[1] == 1:
            changes[f"{module}.bias"] = _scale(factors[:, 0])
    return changes


_CHANGES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Change]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
}


def _become(weight: Tensor) -> Change:
    return lambda before: weight


def _add(update: Tensor, lies: bool, norms: Tensor | None = None) -> Change:
    """Adds an update (out, in); `lies` says that the weight is (in, out). `norms` (out,) are what DoRA learnt."""

    def change(weight: Tensor) -> Tensor:
        total = (weight.T if lies else weight) + update
        if norms is not None:
            total = total * (norms / total.norm(dim=1))[:, None]
        return total.T if lies else total

    return change


def _scale(factors: Tensor) -> Change:
    return lambda weight: weight * factors
