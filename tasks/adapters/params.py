"""The `adapter` of a method in params.yaml: one typed section for each family, told apart by `name`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator

from tasks.adapters.positions import LAYERS, parse_positions
from tasks.core.params import Count, NotNegative, Positive, Section
from tasks.models.quantization import Quantization

OTHERS = "others"
"""The key of the value for modules that no pattern names."""


def _has_others(value: dict[str, Any]) -> dict[str, Any]:
    if OTHERS not in value:
        raise ValueError(f"a value for each pattern needs one for `{OTHERS}`, too")
    return value


def _compiles(value: Any) -> Any:
    """Check that words are valid regular expressions; `all` and `all-linear` are, too."""
    for pattern in [value] if isinstance(value, str) else value:
        if pattern != OTHERS:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"is no regular expression: {error}") from error
    return value


def _by_pattern(value: Any) -> Any:
    return _compiles(_has_others(value)) if isinstance(value, dict) else value


Rank = Annotated[int, Field(ge=1, le=1024)]
Ranks = Annotated[Rank | dict[str, Rank], AfterValidator(_by_pattern)]
Alphas = Annotated[Positive | dict[str, Positive], AfterValidator(_by_pattern)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Layers = Annotated[str, StringConstraints(pattern=f"^({LAYERS})$")] | Annotated[list[int], Field(min_length=1)]
ProjectionPart = Literal["q", "k", "v", "gate", "up"]


def _once_each(parts: list[str]) -> list[str]:
    if len(set(parts)) < len(parts):
        raise ValueError("names a part twice")
    return parts


Parts = Annotated[list[ProjectionPart], Field(min_length=1), AfterValidator(_once_each)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
TargetPattern = Annotated[NonEmpty, AfterValidator(_compiles)]
Names = TargetPattern | Annotated[list[NonEmpty], Field(min_length=1)]
Targets = Names | Annotated[dict[str, Literal["all"] | Parts], Field(min_length=1)]


class FullAdapter(Section):
    """No adapter: the base's own weights are trained, in float32, and computed with in the machine's fast format."""

    name: Literal["full"]
    modules: Names = "all"
    """Every parameter (`all`), those of modules with these names, or of modules that a regular expression matches."""


class LowRank(Section):
    """Fields that low-rank updates of weights have in common."""

    rank: Ranks = 16
    """The paper's r; or one for each pattern of module names, such as {others: 8, "layers.0.*q_proj": 16}."""
    alpha: Alphas = 32.0
    """The update is scaled by alpha / rank; or one for each pattern."""
    dropout: Dropout = 0.0
    """Share of the update's inputs that is zeroed in training."""
    targets: Targets = "all-linear"
    """Every linear layer but the head (`all-linear`, as section 4 of the QLoRA paper found to be needed), names such as
    `[q_proj, embed_tokens]`, a regular expression, or
    what is updated of fused projections: {qkv_proj: [q, v], o_proj: all}."""

    @model_validator(mode="after")
    def _parts_are_plain(self) -> LowRank:
        in_parts = isinstance(self.targets, dict) and any(parts != "all" for parts in self.targets.values())
        if in_parts and (isinstance(self.rank, dict) or isinstance(self.alpha, dict)):
            raise ValueError("parts of fused projections take one rank and one alpha, not some by pattern")
        return self


class LoraAdapter(LowRank):
    """Low-rank updates of weights (arXiv:2106.09685); rslora scales them by another rule, dora learns norms too."""

    name: Literal["lora", "rslora", "dora"]
    """`rslora`: scaled by alpha / sqrt(rank) (arXiv:2312.03732); `dora`: arXiv:2402.09353."""

    @model_validator(mode="after")
    def _dora_is_whole(self) -> LoraAdapter:
        if (
            self.name == "dora"
            and isinstance(self.targets, dict)
            and any(parts != "all" for parts in self.targets.values())
        ):
            raise ValueError("dora learns the norms of whole matrices; take parts of fused projections with lora")
        return self


class QloraAdapter(LowRank):
    """Low-rank updates on a 4-bit base (arXiv:2305.14314)."""

    name: Literal["qlora"]
    quantization: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type of the frozen weights."""
    double_quantization: bool = True
    """Whether the quantization constants are quantized too (section 3 of the paper)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the 4-bit weights are multiplied in; `auto` is what the machine is fast at."""

    @property
    def base_quantization(self) -> Quantization:
        """Return how the weights of the base are held."""
        return Quantization(self.quantization, double=self.double_quantization, compute_dtype=self.compute_dtype)


class Int8Adapter(LowRank):
    """Low-rank updates on an 8-bit base, LLM.int8() (arXiv:2208.07339)."""

    name: Literal["lora8bit"]
    outlier_threshold: NotNegative = 6.0
    """Columns of inputs with a number above it are multiplied in 16 bits (section 3.2 of the paper: 6.0)."""

    @property
    def base_quantization(self) -> Quantization:
        """Return how the weights of the base are held."""
        return Quantization("int8", outlier_threshold=self.outlier_threshold)


class AdaloraAdapter(Section):
    """Low-rank updates whose ranks are moved to where they matter (arXiv:2303.10512)."""

    name: Literal["adalora"]
    rank: Rank = 12
    """Of every update in the beginning."""
    target_rank: Rank = 8
    """What the ranks are on average in the end; below `rank`."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Dropout = 0.0
    """Share of the update's inputs that is zeroed in training."""
    targets: Names = "all-linear"
    """Every linear layer but the head (`all-linear`), names such as `[q_proj, v_proj]`, or a regular expression."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps before the first rank is taken away, the paper's t_i."""
    final_steps: Annotated[int, Field(ge=0)] = 200
    """Steps at the end in which ranks stay as they are, the paper's t_f."""
    every_steps: Count = 10
    """Ranks are moved each so many steps."""
    orthogonality: NotNegative = 0.5
    """Weight of the penalty on singular vectors that are not orthogonal (equation 4, gamma)."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Of the importance of weights over steps (equations 9 and 10, beta)."""

    @model_validator(mode="after")
    def _ranks_are_taken_away(self) -> AdaloraAdapter:
        if self.target_rank >= self.rank:
            raise ValueError("target_rank must be below rank; with equal ranks use lora")
        return self


class Ia3Adapter(Section):
    """Learnt factors of keys, values and the MLP's inner values (arXiv:2205.05638)."""

    name: Literal["ia3"]
    targets: Names = ["k_proj", "v_proj", "down_proj"]
    """Modules whose outputs are scaled, such as `[k_proj, v_proj, down_proj]`, or a regular expression."""
    inputs_of: list[str] | TargetPattern = ["down_proj"]
    """Those of them whose inputs are scaled instead, such as `[down_proj]`."""

    @model_validator(mode="after")
    def _inputs_are_targets(self) -> Ia3Adapter:
        both = isinstance(self.inputs_of, list) and isinstance(self.targets, list)
        if both and (others := set(self.inputs_of) - set(self.targets)):
            raise ValueError(f"inputs_of: {', '.join(sorted(others))} is not among targets")
        return self


class PromptTuningAdapter(Section):
    """Learnt embeddings before each prompt (arXiv:2104.08691)."""

    name: Literal["prompt_tuning"]
    tokens: Count = 20
    """How many."""
    start: Literal["random", "text", "vocabulary"] = "vocabulary"
    """What they are in the beginning: random numbers, the embeddings of `text`, or of random words."""
    text: str = ""
    """For `start: text`, repeated or cut to the number of tokens; else empty."""

    @model_validator(mode="after")
    def _text_if_any(self) -> PromptTuningAdapter:
        if bool(self.text) != (self.start == "text"):
            raise ValueError("text must be given for `start: text`, and be empty otherwise")
        return self


class PTuningAdapter(Section):
    """Learnt embeddings before each prompt, as a small network writes them: P-tuning v1 (arXiv:2103.10385)."""

    name: Literal["p_tuning"]
    tokens: Count = 20
    """How many."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network; after the training it is left out."""
    hidden_size: Count = 128
    """Its width."""
    dropout: Dropout = 0.0
    """Of the LSTM's inner values."""


class PrefixAdapter(Section):
    """Learnt keys and values before each prompt, in every layer, as a network writes them (arXiv:2101.00190)."""

    name: Literal["prefix"]
    tokens: Count = 20
    """How many."""
    hidden_size: Count = 512
    """Width of the network; after the training it is left out."""


class PTuningV2Adapter(Section):
    """Learnt keys and values before each prompt, in every layer, without a network: P-tuning v2 (arXiv:2110.07602)."""

    name: Literal["p_tuning_v2"]
    tokens: Count = 20
    """How many."""


class ReftAdapter(Section):
    """Low-rank edits of hidden states at prompt tokens (arXiv:2404.03592)."""

    name: Literal["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"]
    """The intervention: loreft is equation 2 of the paper, direft equation 3, the others leave parts of these out."""
    rank: Rank = 8
    """Dimensions of the edited subspace, the paper's r."""
    layers: Layers = "all"
    """Which layers are edited, from 0: `all`, a range such as 4-7, or a list."""
    component: Literal["block_output", "attention_output", "mlp_output"] = "block_output"
    """What is edited in them."""
    positions: str = "last"
    """Of the prompt: `last`, `all`, `fN` (the first N tokens), `lN` or `fN+lM`. Of a prompt of p tokens at most p / 2,
    rounded down, are first ones, and at most p / 2, rounded up, last ones, as in pyreft."""
    share_weights: bool = False
    """Whether first and last tokens have one edit a layer instead of two."""
    bias: bool = True
    """Whether the learned map has a bias, the paper's b; consreft and lobireft learn nothing else."""
    dropout: Dropout = 0.0
    """Share of the edit that is zeroed in training."""
    cache_mib: Annotated[int, Field(ge=0)] = 256
    """Memory for hidden states where the first edit is made, the same in every epoch; with less none are kept."""

    @field_validator("positions")
    @classmethod
    def _known_positions(cls, value: str) -> str:
        parse_positions(value)
        return value


class BottleneckAdapter(Section):
    """Small networks with a residual connection inside the layers."""

    name: Literal["bottleneck"]
    form: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """After attention and MLP (arXiv:1902.00751), after layers (arXiv:2005.00052), beside MLPs (arXiv:2110.04366)."""
    reduction_factor: Positive = 16.0
    """The hidden size divided by the network's own."""
    non_linearity: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    """What stands between its two linear maps."""
    scaling: Positive = 1.0
    """What the network's output is multiplied by."""
    layers: Layers = "all"
    """Which layers get one, from 0: `all`, a range such as 4-7, or a list."""
    dropout: Dropout = 0.0
    """Share of the network's inner values that is zeroed in training."""


class PeftAdapter(Section):
    """Any other method of PEFT; it is packaged with its base instead of merged."""

    name: Literal["peft"]
    method: NonEmpty
    """PEFT's name of the method, such as OFT or VERA."""
    config: dict[str, Any] = {}
    """The fields of its configuration class."""


AnyAdapter: TypeAlias = Annotated[
    FullAdapter
    | LoraAdapter
    | QloraAdapter
    | Int8Adapter
    | AdaloraAdapter
    | Ia3Adapter
    | PromptTuningAdapter
    | PTuningAdapter
    | PrefixAdapter
    | PTuningV2Adapter
    | ReftAdapter
    | BottleneckAdapter
    | PeftAdapter,
    Field(discriminator="name"),
]


DEFAULT_ADAPTER = QloraAdapter(name="qlora")
"""What a method trains that names no adapter: it fits the most into the least memory."""


class Adapted(Section):
    """The part of a method that stages read which need its adapter alone."""

    model_config = ConfigDict(extra="ignore")

    adapter: AnyAdapter = DEFAULT_ADAPTER
