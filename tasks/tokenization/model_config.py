"""The configuration of a model folder, which anybody may have written: checked before a library acts on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUILT_IN = frozenset(("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"))
"""Implementations of attention and of experts that transformers has itself; any other name is looked up on the hub."""

LARGEST = 1 << 40
"""No size in a configuration is larger."""

MOST_LAYERS = 10_000

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_INNER = ("moe_intermediate_size", "intermediate_size")
_ROWS = ("vocab_size", "n_positions")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_COUNTED = (*_DEPTHS, *_EXPERTS, *_WIDTHS, *_INNER, *_ROWS)
_LAYERS = frozenset((*_DEPTHS, "num_decoder_layers"))
_PARTS = frozenset((*_LAYERS, *_EXPERTS, "n_shared_experts", "encoder_layers", "decoder_layers"))
"""What there is a module of for each: some of these may be none."""

_SIZES = frozenset(
    ("hidden_size", "vocab_size", "intermediate_size", "n_embd", "d_model", "d_ff", "num_attention_heads", "n_head")
)
"""What counts parts of a model, in the words of most families."""

_WRITTEN_HERE = {"baichuan"}
"""Architectures that transformers lacks and temper has: what code their folders ask for is not needed, nor ever run."""


def refuse_code(path: Path) -> None:
    """Refuse a config.json or tokenizer_config.json that names code to run, of its own or of the hub.

    Raises:
        BadModel: it does, at whatever depth; or it is not valid JSON.
    """
    if not path.is_file():
        return
    content = read_object(path)
    asks = [
        key
        for key, value in _entries(content)
        if (key == "auto_map" and content.get("model_type") not in _WRITTEN_HERE)
        or (key.endswith(("_implementation", "_implementation_internal")) and not _is_built_in(value))
    ]
    if asks:
        raise BadModel(
            "asks to run its own code; refused", where=str(path), got=", ".join(asks), fix="remove these keys"
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of an object and of all objects in it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _is_built_in(value: Any) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]  # one for each part of a model
    return all(name is None or (isinstance(name, str) and name in BUILT_IN) for name in names)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a model folder.

    Raises:
        BadModel: it is none, asks for code, has sizes that no model has, or is of no architecture that is known.
    """
    from transformers import AutoConfig

    from tasks.tokenization.baichuan import make_known

    make_known()
    path = folder / "config.json"
    refuse_code(path)
    check_sizes(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library makes of values that mean nothing to it
        raise does_not_load(folder, error) from error
    return config


def check_sizes(path: Path) -> None:
    """Refuse sizes for which memory would be asked before anything could say that they are wrong.

    Raises:
        BadModel: there are some, or what is a count elsewhere is no whole number.
    """
    wrong = []
    for key, value in _entries(read_object(path)):
        counted = key in _LAYERS or key in _SIZES
        number = isinstance(value, int) and not isinstance(value, bool)
        most = MOST_LAYERS if key in _PARTS else LARGEST
        if number and (value > most or -value > most or (counted and value < 1)):
            wrong.append(f"{key}: {value}")
        elif (
            counted and not number and value is not None and not isinstance(value, list)
        ):  # some have one for each layer
            wrong.append(f"{key}: {value!r:.60}")
    if wrong:
        raise BadModel("has sizes that no model has", where=str(path), examples=wrong)
    _check_against_weights(path)


LEAST_REFUSED = 1 << 24
"""So many weights any machine has room for: files that are cut short are told by whoever reads them."""

MOST_TIMES_ITS_FILES = 16
"""Weights that a configuration speaks of are no more than so many times the bytes of its files: at least 4 bits each,
with room for what one file holds once and a model many times."""


def _check_against_weights(path: Path) -> None:
    """Refuse sizes of which the weights' files hold next to nothing: all else would be made up, in this memory."""
    held = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    if not held:  # a configuration alone, of which a model is to be made or estimated
        return
    content = read_object(path)
    parts = [content, *(value for _, value in _entries(content) if isinstance(value, Mapping))]
    named = max(parts, key=_least_weights)
    weights = _least_weights(named)
    if weights > max(MOST_TIMES_ITS_FILES * held, LEAST_REFUSED):
        raise BadModel(
            "has sizes of which its weights are a small part",
            where=str(path),
            got=f"at least {weights:,} weights, by files of {held:,} bytes",
            examples=[f"{key}: {named[key]}" for key in _COUNTED if isinstance(named.get(key), int)],
            fix="fetch the folder again: its configuration is of another model",
        )


def _least_weights(part: Mapping[str, Any]) -> int:
    """Return how many weights a model of these sizes has at least: embeddings, one matrix a layer, and its experts."""

    def first(keys: Iterable[str]) -> int:
        return next((part[key] for key in keys if type(part.get(key)) is int), 0)

    width, depth = first(_WIDTHS), first(_DEPTHS)
    rows = max(first([key]) for key in _ROWS)
    return width * max(rows, depth * width, first(_EXPERTS) * first(_INNER))


def does_not_load(folder: Path, error: Exception) -> BadModel:
    """Build the error for a folder that a library could make nothing of."""
    return BadModel("does not load", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0][:300])
