"""The `base` of params.yaml: where the base model comes from, one typed section for each way, told apart by `kind`."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from tasks.adapters.params import LoraAdapter
from tasks.core.params import Commit, Count, FilePath, HubName, Name, NotNegative, Positive, Section, Seed, Share
from tasks.engine.params import Schedule

FileName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f/\\]+$")]
Token = Annotated[str, StringConstraints(min_length=1)]


def _is_day(value: str) -> str:
    date.fromisoformat(value)
    return value


def _as_text(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value  # YAML has dates of its own


Day = Annotated[
    str, BeforeValidator(_as_text), StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_is_day)
]


class Templated(Section):
    """What every base that is not made here has."""

    template: Name = "own"
    """`own` for the chat template that the model brings, if any, or the name of one in data/templates/."""
    template_date: Day = "2025-01-01"
    """What a template that writes the date of the day writes instead, as Llama 3's does: it is then the same in
    training, evaluation and serving, whenever they are."""


class LocalBase(Templated):
    """A Hugging Face model folder on this disk."""

    kind: Literal["local"]
    path: FilePath
    """The folder: config.json, safetensors, a tokenizer."""


class HubBase(Templated):
    """A model of the Hugging Face hub, pinned to a commit."""

    kind: Literal["hub"]
    path: Literal["data/remote.md"] = "data/remote.md"
    """Stands in for what is not on this disk: a DVC dependency cannot be left out."""
    id: HubName
    """Owner and name."""
    revision: Commit
    """The whole commit hash; branches and tags move and are refused."""


class CheckpointBase(Templated):
    """A Llama that plain PyTorch code has saved as a state dict, and its tokenizer."""

    kind: Literal["checkpoint"]
    path: FilePath
    """The folder with both files."""
    weights: FileName
    """The state dict: `base_model.layers.0.self_attn.q_proj.weight` and so on; also within {model: ...}."""
    tokenizer: FileName = "tokenizer.json"
    """The JSON file of the library `tokenizers`."""
    heads: Count
    """Attention heads; they divide the hidden size."""
    kv_heads: Count
    """Heads of keys and values; they divide `heads`."""
    rms_norm_eps: Positive = 1e-5
    """What RMSNorm adds to the mean square."""
    rope_theta: Positive = 10000.0
    """The base of the rotary angles."""
    rotation: Literal["half_split", "interleaved"] = "half_split"
    """What is rotated together: numbers half a head apart, as in Hugging Face's code, or neighbours, as in Meta's."""
    context_tokens: Annotated[int, Field(ge=2)]
    """The longest text that it was trained on."""
    stop_token: Token
    """The token of the tokenizer that ends a text."""

    @model_validator(mode="after")
    def _heads_fit(self) -> CheckpointBase:
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        return self


MICRO_BATCH_BLOCKS = 8
"""Blocks in a forward pass at most, where params name no number."""


class Pretraining(Section):
    """Settings of every training on whole texts: which rows, what is held out, and the course."""

    path: FilePath = "data/clean"
    """The clean rows: `data/clean`."""
    rows: Annotated[list[Literal["text", "chat"]], Field(min_length=1)] = ["text"]
    """The kinds of rows that are trained on: plain texts, chats in the form of the chat template, or both."""
    held_out: Share = 0.1
    """The share of groups that is never trained on; with that of `render` it is the same groups. 0 measures nothing."""
    held_out_rows: Count = 1000
    """Held-out rows on which loss and perplexity are measured, at most."""
    context_tokens: Annotated[int, Field(ge=2)] = 512
    """Length of the blocks that texts are packed into."""
    tokens: Count
    """How many tokens to train on in all; the rows are repeated as often as that takes."""
    batch_tokens: Count = 32768
    """Tokens in a step; a multiple of `context_tokens`."""
    micro_batch_size: Count = Field(
        default_factory=lambda known: min(known["batch_tokens"] // known["context_tokens"], MICRO_BATCH_BLOCKS)
    )
    """Blocks in a forward pass; 8 at most, unless it is said. A step adds up the gradients of as many passes as it
    takes."""
    learning_rate: Positive = 1e-3
    """The peak, after warm-up."""
    schedule: Schedule = "cosine"
    """From the peak on; linear and cosine end at zero; so does {wsd: 0.2}, which goes down in the last fifth only."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.1
    """Decoupled, on matrices."""
    checkpoint_every_steps: Count = 100
    """What a kill loses at most."""
    seed: Seed = 1
    """Of the initial weights and the order of the blocks."""

    @model_validator(mode="after")
    def _batch_fits(self) -> Pretraining:
        if self.batch_tokens % self.context_tokens:
            raise ValueError("batch_tokens must be a multiple of context_tokens")
        if self.micro_batch_size > self.batch_tokens // self.context_tokens:
            raise ValueError("micro_batch_size must be at most batch_tokens / context_tokens")
        return self


class PretrainBase(Pretraining):
    """A Llama and its byte-level BPE tokenizer, trained here from the clean text and chat rows."""

    kind: Literal["pretrain"]
    vocabulary: Annotated[int, Field(ge=300)] = 16384
    """Entries of the tokenizer, special tokens included."""
    hidden_size: Count = 768
    """Width; a multiple of `heads`."""
    mlp_size: Count = 2048
    """Width between the MLP's two halves."""
    layers: Count = 12
    """Decoder layers."""
    heads: Count = 12
    """Attention heads; a multiple of `kv_heads`."""
    kv_heads: Count = 4
    """Heads of keys and values."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> PretrainBase:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")
        return self


class PinnedBase(Templated):
    """A Hugging Face model folder on this disk, pinned to its content: DVC watches the rows, not this folder."""

    kind: Literal["local"]
    path: FilePath
    """The folder: config.json, safetensors, a tokenizer."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the names and digests of its files; another one is refused, and the message says what it is."""


class Growth(Section):
    """Tokens that the vocabulary gets before the training; an embedding row and an output row for each."""

    tokens: list[Token] = []
    """Texts that become one token each, wherever they stand; [] for none."""
    merges: Annotated[int, Field(ge=0)] = 0
    """How many more are learned from the rows, by going on with the merges of the tokenizer's byte-pair encoding."""
    begin_as: Literal["pieces", "all"] = "pieces"
    """A new row is the mean of the rows of the tokens that it stands for, or of all rows."""


class AllWeights(Section):
    """Every weight is trained, in float32."""

    name: Literal["full"]


class ContinueBase(Pretraining):
    """An existing model that is trained further on the clean rows, with its own tokenizer or a larger one."""

    kind: Literal["continue"]
    of: Annotated[PinnedBase | HubBase, Field(discriminator="kind")]
    growth: Growth = Growth()
    adapter: Annotated[AllWeights | LoraAdapter, Field(discriminator="name")] = LoraAdapter(name="lora")


AnyBase: TypeAlias = Annotated[
    LocalBase | HubBase | CheckpointBase | PretrainBase | ContinueBase, Field(discriminator="kind")
]
