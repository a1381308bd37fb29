"""Model folders: what may be in one, how it is loaded, and the log-probabilities that stages read off a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tasks.architecture import architecture_in
from tasks.device import compute_dtype, device
from tasks.distributed import shards_weights
from tasks.errors import BadModel
from tasks.outputs import read_object
from tasks.shards import weight_map

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from tasks.adapter_params import Int8Adapter, QloraAdapter
    from tasks.adapters.below import Below
    from tasks.shared_prompts import Joined

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
)
"""What belongs to a model folder; anything else in one is left behind."""

Model: TypeAlias = "PreTrainedModel | PeftModel"
"""A model with or without an adapter of PEFT's on it."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face model folder that temper uses, after checking that it is safe and whole.

    Raises:
        BadModel: it is no model folder, has only pickle weights, wants to run its own code, or a shard is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise BadModel(
            "is not a model folder", where=str(folder), got="no config.json", fix="name a Hugging Face model folder"
        )
    for path in (config, folder / "tokenizer_config.json"):
        refuse_code(path)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise BadModel(
                "pickle weights are refused: loading them can run any code",
                where=str(folder),
                got=", ".join(pickles),
                expected="*.safetensors",
                fix="convert the weights to safetensors where you trust them",
            )
        raise BadModel("has no weights", where=str(folder), expected="*.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({shard for shard in weight_map(index).values() if not (folder / shard).is_file()})
        if missing:
            raise BadModel(
                "a shard named in the index is missing", where=str(folder), examples=missing, fix="fetch it again"
            )
    return sorted({p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()})


_WRITTEN_HERE = {"baichuan"}
"""Architectures that transformers lacks and temper has: what code their folders ask for is not needed, nor ever run."""


def refuse_code(path: Path) -> None:
    """Refuses a config.json or tokenizer_config.json that names code of its own to run.

    Raises:
        BadModel: it does, or it is not valid JSON.
    """
    if not path.is_file():
        return
    content = read_object(path)
    asks = [key for key in content if key == "auto_map" or key.startswith("_attn_implementation")]
    if content.get("model_type") in _WRITTEN_HERE:
        asks = [key for key in asks if key != "auto_map"]
    if asks:
        raise BadModel(
            "asks to run its own code; refused", where=str(path), got=", ".join(asks), fix="remove these keys"
        )


def load_model(
    folder: Path, quantized_for: QloraAdapter | Int8Adapter | None = None, *, full_precision: bool = False
) -> PreTrainedModel:
    """A language model from a folder, of whichever kind it is, in this machine's compute dtype, ready to run.

    Args:
        folder: a Hugging Face model folder.
        quantized_for: asks for the weights in the 4-bit or 8-bit form that this adapter is trained on.
        full_precision: asks for the weights in float32, whatever they are computed with.

    Raises:
        BadModel: the folder is unsafe, incomplete, or not of a known architecture.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from tasks.quantized import prepare, quantization

    model_files(folder)
    loader = getattr(transformers, architecture_in(folder).loader)
    try:
        model: PreTrainedModel = loader.from_pretrained(
            folder,
            dtype=torch.float32 if full_precision else compute_dtype(),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": "cpu" if shards_weights() else device()},
            quantization_config=quantization(quantized_for, compute_dtype()) if quantized_for else None,
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadModel(
            "does not load", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0]
        ) from error
    if quantized_for:
        prepare(model, quantized_for)
    model.requires_grad_(False)
    model.eval()
    return model


# --- what stages read off a model -------------------------------------------------------------------------------------


class TokenRow(NamedTuple):
    """Token ids with a loss mask of the same length; the prompt is the part before the first scored token.

    `desirable` is the label of a labelled reply (KTO); other rows have none, and are all to be learnt.
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    prompt_tokens: int
    desirable: bool = True

    @property
    def tokens(self) -> int:
        """How long the row is."""
        return len(self.ids)

    @property
    def scored_tokens(self) -> int:
        """How many tokens the loss falls on; nothing stands before the first."""
        return sum(self.mask[1:])


class Likelihood(NamedTuple):
    """Of a row's scored tokens: their log-probability in nats, and whether greedy decoding would write them."""

    logp: float
    greedy: bool


class Scored(NamedTuple):
    """Log-probabilities of scored tokens: `logp` (tokens,) in nats, float32; `row` (tokens,) says whose each is.

    `mean_logp` (tokens,) is the mean over the vocabulary in their places, and `likeliest` (tokens,) bool says which of
    them are the arg-max, where they were asked for.
    """

    logp: Tensor
    row: Tensor
    rows: int
    mean_logp: Tensor | None = None
    likeliest: Tensor | None = None

    def row_sums(self) -> Tensor:
        """The log-probability of each row's scored tokens together, (rows,)."""
        return self.logp.new_zeros(self.rows).index_add(0, self.row, self.logp)

    def row_means(self) -> Tensor:
        """The same per token, (rows,)."""
        return self.row_sums() / self.row_tokens()

    def row_tokens(self) -> Tensor:
        """How many tokens of each row are scored, (rows,)."""
        return self.row.bincount(minlength=self.rows)

    def likelihoods(self) -> list[Likelihood]:
        """Of each row.

        Raises:
            ValueError: `likeliest` was not asked for.
        """
        if self.likeliest is None:
            raise ValueError("scored without with_likeliest")
        logp = self.logp.double()
        sums = logp.new_zeros(self.rows).index_add(0, self.row, logp)
        missed = self.row[~self.likeliest].bincount(minlength=self.rows)
        return [Likelihood(*each) for each in zip(sums.tolist(), (missed == 0).tolist(), strict=True)]


def score_tokens(
    model: Model, rows: Sequence[TokenRow], below: Below | None = None, *, with_mean: bool = False
) -> Scored:
    """The log-probability of every scored token of some rows, given what stands before it.

    The vocabulary head runs on scored positions only, and tile by tile: logits never exist as a whole. Rows stand in
    one sequence without padding, and those with the same prompt share it, where the model and its adapter allow that.
    Nor is anything computed twice that `below` keeps. `with_mean` asks for `mean_logp`, too.
    """
    import torch

    from tasks.logits import score_hidden

    joined = _joined(model, rows) if below is None else None
    hidden = _joined_hidden(model, rows, joined) if joined else _padded_hidden(model, rows, below)
    targets = [token for row in rows for token, learnt in zip(row.ids[1:], row.mask[1:], strict=True) if learnt]
    whose = [number for number, row in enumerate(rows) for _ in range(row.scored_tokens)]
    scores = score_hidden(model, hidden, torch.tensor(targets, device=model.device), with_mean=with_mean)
    return Scored(scores.logp, torch.tensor(whose, device=model.device), len(rows), scores.mean_logp)


def _joined(model: Model, rows: Sequence[TokenRow]) -> Joined | None:
    """The rows in one sequence, where the model and its adapter allow that and it pays."""
    from tasks.adapters.virtual import virtual_tokens
    from tasks.logits import base_of
    from tasks.shared_prompts import drops, join, joinable

    base = base_of(model)
    longest = max(row.tokens for row in rows)
    if virtual_tokens(model) or not joinable(base, longest):
        return None
    prompts = [row.prompt_tokens for row in rows]
    joined = join([row.ids for row in rows], prompts, model.device, share=not drops(base))
    return joined if joined.pays else None


def _joined_hidden(model: Model, rows: Sequence[TokenRow], joined: Joined) -> Tensor:
    """The hidden states that scored tokens follow from, (tokens, hidden), of rows joined in one sequence."""
    import torch

    from tasks.adapters.prompts import prompts_of
    from tasks.logits import base_of
    from tasks.shared_prompts import joined_hidden

    prompts = prompts_of(model)
    shapes = ([0] * len(joined.trees), *zip(*(tree[:2] for tree in joined.trees), strict=True))
    where = (
        prompts.at(*(torch.tensor(numbers, device=model.device) for numbers in shapes)) if prompts else nullcontext()
    )
    with where:
        hidden = joined_hidden(base_of(model), joined)
    before = [
        place
        for row, places in zip(rows, joined.places, strict=True)
        for place, learnt in zip(places[:-1], row.mask[1:], strict=True)
        if learnt
    ]
    return hidden.index_select(0, torch.tensor(before, device=hidden.device))


def _padded_hidden(model: Model, rows: Sequence[TokenRow], below: Below | None) -> Tensor:
    """The same, of rows padded on the right, after a learnt prompt and what `below` keeps."""
    import torch

    from tasks.adapters.virtual import with_virtual_tokens

    prompts = [row.prompt_tokens for row in rows]
    with below.known([row.ids for row in rows], prompts) if below else nullcontext() as reuse:
        start = reuse.start if reuse else [0] * len(rows)
        longest = max(len(row.ids) - first for row, first in zip(rows, start, strict=True))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attended = torch.zeros(len(rows), longest, dtype=torch.long)
        scored = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, first) in enumerate(zip(rows, start, strict=True)):
            ids[i, : len(row.ids) - first] = torch.tensor(row.ids[first:])
            attended[i, : len(row.ids) - first] = 1
            scored[i, : len(row.mask) - first] = torch.tensor(row.mask[first:])
        scored[:, 0] = False  # nothing stands before the first token
        ids, attended, scored = (t.to(model.device) for t in (ids, attended, scored))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        if reuse and reuse.cache:
            given["attention_mask"] = torch.cat([reuse.attended, attended], dim=1)
            places = torch.arange(longest, device=ids.device)
            given["position_ids"] = torch.tensor(start, device=ids.device)[:, None] + places
            given["past_key_values"] = reuse.cache
        given, learnt = with_virtual_tokens(model, given)
        with _prompt_ends(model, prompts, start):
            hidden = model.get_decoder()(**given).last_hidden_state[:, learnt:]
    before: Tensor = hidden[scored.roll(-1, dims=1)]  # position t predicts token t + 1
    return before


def _prompt_ends(model: Model, lengths: Sequence[int], start: Sequence[int]) -> Any:
    import torch

    from tasks.adapters.prompts import prompts_of

    prompts = prompts_of(model)
    if prompts is None:
        return nullcontext()
    return prompts.given(*(torch.tensor(numbers, device=model.device) for numbers in (lengths, start)))
