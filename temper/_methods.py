"""Adapters and objectives as small typed objects; their defaults are those of the sections, which a test compares.

They are no sections themselves: making one should import no library.

Each becomes the section of the same name that docs/params.md explains, and is checked as such when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from tasks.core.errors import BadParams

Targets = str | list[str] | dict[str, Any]
"""Modules to adapt: `all-linear`, names, a regular expression, or parts of fused projections."""


@dataclass(frozen=True, kw_only=True)
class _Named:
    """An object with a section in params, told apart by `name`."""

    name: ClassVar[str]

    def section(self) -> dict[str, Any]:
        """Return the section of params that says the same."""
        return {"name": self.name, **asdict(self)}


class _CheckedAdapter(_Named):
    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadParams: one or more are wrong; all of them are named.
        """
        adapter_section(self)


class _CheckedObjective(_Named):
    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadParams: one or more are wrong; all of them are named.
        """
        objective_section(self)


@dataclass(frozen=True, kw_only=True)
class LoRA(_CheckedAdapter):
    """Low-rank updates of weights (arXiv:2106.09685).

    Attributes:
        rank: the paper's r.
        alpha: the update is scaled by alpha / rank.
        dropout: the share of the update's inputs that is zeroed in training.
        targets: the modules that are updated.
    """

    name = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Targets = "all-linear"


@dataclass(frozen=True, kw_only=True)
class QLoRA(_CheckedAdapter):
    """Low-rank updates on a 4-bit base (arXiv:2305.14314).

    Attributes:
        rank: the paper's r.
        alpha: the update is scaled by alpha / rank.
        dropout: the share of the update's inputs that is zeroed in training.
        targets: the modules that are updated.
        quantization: the data type of the frozen weights.
        double_quantization: whether the quantization constants are quantized too.
        compute_dtype: what the 4-bit weights are multiplied in; `auto` is what the machine is fast at.
    """

    name = "qlora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    quantization: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ReFT(_CheckedAdapter):
    """Low-rank edits of hidden states at prompt tokens (arXiv:2404.03592).

    Attributes:
        intervention: loreft is equation 2 of the paper, direft equation 3; the others leave parts of these out.
        rank: the dimensions of the edited subspace, the paper's r.
        layers: the layers that are edited, from 0: `all`, a range such as `4-7`, or a list.
        component: the output that is edited in them.
        positions: the prompt tokens that are edited: `last`, `all`, `fN`, `lN` or `fN+lM`.
        share_weights: whether first and last tokens have one edit a layer instead of two.
        bias: whether the map has a bias, the paper's b.
        dropout: the share of the edit that is zeroed in training.
        cache_mib: memory, in MiB, for hidden states below the first edit; 0: none.
    """

    name = "reft"
    intervention: Literal["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"] = "loreft"
    rank: int = 8
    layers: str | list[int] = "all"
    component: Literal["block_output", "attention_output", "mlp_output"] = "block_output"
    positions: str = "last"
    share_weights: bool = False
    bias: bool = True
    dropout: float = 0.0
    cache_mib: int = 256

    def section(self) -> dict[str, Any]:
        """Return the section of params that says the same; there the intervention is the name."""
        values = super().section()
        values["name"] = values.pop("intervention")
        return values


@dataclass(frozen=True, kw_only=True)
class Full(_CheckedAdapter):
    """No adapter: the base's own weights are trained, in float32.

    Attributes:
        modules: every parameter (`all`), or those of modules with these names or that a regular expression matches.
    """

    name = "full"
    modules: str | list[str] = "all"


@dataclass(frozen=True, kw_only=True)
class SFT(_CheckedObjective):
    """Cross-entropy on the assistant's tokens.

    Attributes:
        label_smoothing: the share of a target that is spread evenly over the vocabulary.
        neftune_alpha: noise on the input embeddings, the alpha of arXiv:2310.05914; 0: none.
    """

    name = "sft"
    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ORPO(_CheckedObjective):
    """Cross-entropy on the chosen reply plus an odds-ratio penalty (arXiv:2403.07691).

    Attributes:
        weight: the paper's lambda; TRL calls it beta.
        likelihood: what the cross-entropy is of.
    """

    name = "orpo"
    weight: float = 0.1
    likelihood: Literal["reply", "prompt_and_reply"] = "reply"


@dataclass(frozen=True, kw_only=True)
class DPO(_CheckedObjective):
    """Direct preference optimisation against the untuned base (arXiv:2305.18290).

    Attributes:
        loss: the paper's own (`sigmoid`), IPO or hinge.
        beta: how strongly the reference holds.
        label_smoothing: how probable it is that a pair is the wrong way round; with `sigmoid` only.
        reference: computed by switching the adapter off at every step, or once for all rows before the first.
    """

    name = "dpo"
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: Literal["adapter_off", "precomputed"] = "adapter_off"


@dataclass(frozen=True, kw_only=True)
class SimPO(_CheckedObjective):
    """Length-normalised preference optimisation with a margin, without a reference (arXiv:2405.14734).

    Attributes:
        beta: what log-probabilities per token are multiplied by to be rewards.
        gamma: by how much the chosen reply's reward must exceed the rejected one's.
    """

    name = "simpo"
    beta: float = 2.0
    gamma: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KTO(_CheckedObjective):
    """Learning from replies that are labelled good or bad, without pairs (arXiv:2402.01306).

    Attributes:
        beta: how soon a gain over the reference saturates.
        desirable_weight: weight of good replies.
        undesirable_weight: weight of bad replies.
        reference: computed by switching the adapter off at every step, or once for all rows before the first.
    """

    name = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Literal["adapter_off", "precomputed"] = "adapter_off"


AnyAdapter = LoRA | QLoRA | ReFT | Full | Mapping[str, Any]
"""An adapter; any other one of docs/params.md is given as its section, such as {"name": "ia3", ...}."""

AnyObjective = SFT | ORPO | DPO | SimPO | KTO
"""An objective."""


def adapter_section(adapter: _Named | Mapping[str, Any]) -> Any:
    """Return an adapter as params have it.

    Raises:
        BadParams: one or more values are wrong; all of them are named.
    """
    from tasks.adapters.params import AnyAdapter as Section

    content = dict(adapter) if isinstance(adapter, Mapping) else adapter.section()
    return checked(Section, content, type(adapter).__name__)


def objective_section(objective: _Named) -> Any:
    """Return an objective as params have it.

    Raises:
        BadParams: one or more values are wrong; all of them are named.
    """
    from tasks.train.params import AnyObjective as Section

    return checked(Section, objective.section(), type(objective).__name__)


def checked(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """Check values against a type that pydantic knows, and return them typed.

    Raises:
        BadParams: one or more are wrong; all of them are named.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc'])) or where}: {each['msg']}; got {each['input']!r}"
            for each in error.errors()
        ]
        raise BadParams("has values that are wrong", where=where, examples=wrong, fix="see docs/params.md") from error
