"""The `adapter` of a method in params.yaml: one typed section for each family, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.fields import Positive, Section
from tasks.positions import parse_positions

Rank = Annotated[int, Field(ge=1, le=1024)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Targets = Literal["all-linear"] | str | Annotated[list[str], Field(min_length=1)]


class LoraAdapter(Section):
    """Low-rank updates of weights (arXiv:2106.09685); rslora scales them by another rule, dora learns norms too."""

    name: Literal["lora", "rslora", "dora"]
    """`rslora`: scaled by alpha / sqrt(rank) (arXiv:2312.03732); `dora`: arXiv:2402.09353."""
    rank: Rank
    """The paper's r."""
    alpha: Positive
    """The update is scaled by alpha / rank."""
    dropout: Dropout
    """Share of the update's inputs that is zeroed in training."""
    targets: Targets
    """Every linear layer but the head (`all-linear`), names such as `[q_proj, v_proj]`, or a regular expression."""


class QloraAdapter(Section):
    """Low-rank updates on a 4-bit base (arXiv:2305.14314)."""

    name: Literal["qlora"]
    rank: Rank
    """The paper's r."""
    alpha: Positive
    """The update is scaled by alpha / rank."""
    dropout: Dropout
    """Share of the update's inputs that is zeroed in training."""
    targets: Targets
    """Every linear layer but the head (`all-linear`), names such as `[q_proj, v_proj]`, or a regular expression."""
    quantization: Literal["nf4", "fp4"]
    """The 4-bit data type of the frozen weights."""
    double_quantization: bool
    """Whether the quantization constants are quantized too (section 3 of the paper)."""


class ReftAdapter(Section):
    """Low-rank edits of hidden states at prompt tokens (arXiv:2404.03592)."""

    name: Literal["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"]
    """The intervention: loreft is equation 2 of the paper, direft equation 3, the others leave parts of these out."""
    rank: Rank
    """Dimensions of the edited subspace, the paper's r."""
    layers: Literal["all"] | Annotated[list[int], Field(min_length=1)]
    """Which layers are edited, from 0."""
    component: Literal["block_output", "attention_output", "mlp_output"]
    """What is edited in them."""
    positions: str
    """Of the prompt: `last`, `all`, `fN` (the first N tokens), `lN` or `fN+lM`."""
    share_weights: bool
    """Whether first and last tokens have one edit a layer instead of two."""
    dropout: Dropout
    """Share of the edit that is zeroed in training."""
    cache_mib: Annotated[int, Field(ge=0)]
    """Memory for hidden states where the first edit is made, the same in every epoch; with less none are kept."""

    @field_validator("positions")
    @classmethod
    def _known_positions(cls, value: str) -> str:
        parse_positions(value)
        return value


class BottleneckAdapter(Section):
    """Small networks with a residual connection inside the layers."""

    name: Literal["bottleneck"]
    form: Literal["houlsby", "pfeiffer", "parallel"]
    """After attention and MLP (arXiv:1902.00751), after layers (arXiv:2005.00052), beside MLPs (arXiv:2110.04366)."""
    reduction_factor: Positive
    """The hidden size divided by the network's own."""
    non_linearity: Literal["relu", "silu", "gelu", "tanh"]
    """What stands between its two linear maps."""
    scaling: Positive
    """What the network's output is multiplied by."""
    layers: Literal["all"] | Annotated[list[int], Field(min_length=1)]
    """Which layers get one, from 0."""
    dropout: Dropout
    """Share of the network's inner values that is zeroed in training."""


class PeftAdapter(Section):
    """Any other method of PEFT that changes modules; it is packaged with its base instead of merged."""

    name: Literal["peft"]
    method: str
    """PEFT's name of the method, such as IA3, OFT or VERA."""
    config: dict[str, Any]
    """The fields of its configuration class."""


AnyAdapter = LoraAdapter | QloraAdapter | ReftAdapter | BottleneckAdapter | PeftAdapter
