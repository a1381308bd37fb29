"""The files of a merged model: what becomes of each tensor of the base, and of what lies beside the weights.

Needs neither the model nor torch: tensors are read, changed and written block by block (tasks/shards.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tasks.adapter_files import CONFIG
from tasks.errors import BadModel
from tasks.models import MODEL_FILES, model_files, refuse_code
from tasks.outputs import as_json, digest, read_object
from tasks.shards import BYTES, INDEX, Planned, Source, Stored, stored_in, write_shards
from tasks.updates import Change, changes_of

EQUIVALENCE = "equivalence.json"
"""Where a model folder says how far it is from the model that was trained."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Number formats that a merged model may have, and what safetensors calls them."""

_HEADS = {
    "embed_tokens.weight": "lm_head.weight",
    "wte.weight": "lm_head.weight",
    "word_embeddings.weight": "lm_head.weight",
    "embed_in.weight": "embed_out.weight",
}
"""What the embedding's weight is called in files, and the head's of the same model."""

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A folder with one of these brings a tokenizer of its own."""


class Merged(NamedTuple):
    """A model that is to be written: its tensors, and its config.json."""

    tensors: dict[str, Planned]
    config: dict[str, Any]


def merge(
    base: Path, adapter: Path, dtype: str = "own", replaced: Mapping[str, Source] = MappingProxyType({})
) -> Merged:
    """What a base becomes with an adapter.

    Args:
        base: a model folder.
        adapter: the folder of a published adapter, or of weights that were trained whole.
        dtype: a key of DTYPES, or `own`: every tensor keeps its format.
        replaced: what stands in for weights of the base before they are changed, by name.

    Raises:
        BadModel: one of them is unsafe, torn, quantized, or they do not fit each other.
    """
    config, stored = _base(base)
    return _merged(
        config, stored, changes_of(adapter, with_head(stored, config)), dtype, replaced, (adapter / CONFIG).is_file()
    )


def merge_changes(base: Path, changes: Callable[[Mapping[str, Stored]], Mapping[str, Change]], dtype: str) -> Merged:
    """What a base becomes with changes that are worked out for its tensors."""
    config, stored = _base(base)
    return _merged(config, stored, changes(with_head(stored, config)), dtype, {}, True)


def write_merged(
    base: Path,
    adapter: Path,
    wanted: Mapping[Path, Merged],
    most_bytes: int,
    step: Callable[[int], None] = lambda nbytes: None,
) -> dict[Path, dict[str, str]]:
    """Writes merged models into existing folders, in one pass over the base; returns the digests of their files.

    The tokenizer and the chat template are the adapter's, where its folder has a tokenizer; all else is the base's.
    """
    own = [path for pattern in MODEL_FILES for path in adapter.glob(pattern)] if brings_tokenizer(adapter) else []
    beside = {path.name: path for path in model_files(base)}
    beside |= {
        path.name: path for path in own if path.name not in ("config.json", "generation_config.json", "README.md")
    }
    if own:
        refuse_code(adapter / "tokenizer_config.json")
    beside = {name: path for name, path in beside.items() if path.suffix != ".safetensors" and name != INDEX}
    digests = write_shards({folder: made.tensors for folder, made in wanted.items()}, most_bytes, step)
    for folder, made in wanted.items():
        for name, path in beside.items():
            shutil.copyfile(path, folder / name)
        (folder / "config.json").write_text(as_json(made.config))
        digests[folder] |= {name: digest(folder / name) for name in {*beside, "config.json"}}
    return digests


def brings_tokenizer(adapter: Path) -> bool:
    """Whether an adapter's folder has a tokenizer of its own."""
    return any((adapter / name).is_file() for name in _TOKENIZER)


def with_head(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a base, with a head that is not stored because it is the embedding."""
    embedding, head = embedding_and_head(stored)
    if embedding and head not in stored and not config.get("is_encoder_decoder"):
        return {**stored, head: stored[embedding]}
    return dict(stored)


def embedding_and_head(names: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the embedding's weight and of the head's; empty where the embedding has none of the usual names."""
    for ending, head in _HEADS.items():
        if found := next((name for name in names if f".{name}".endswith(f".{ending}")), None):
            return found, head
    return "", ""


def _base(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    model_files(folder)
    config = read_object(folder / "config.json")
    if quantized := config.get("quantization_config"):
        raise BadModel(
            "is quantized: merging into it would lose precision",
            where=str(folder / "config.json"),
            got=json.dumps(quantized)[:80],
            fix="name the base in 16 bit",
        )
    return config, stored_in(folder)


def _merged(
    config: dict[str, Any],
    stored: Mapping[str, Stored],
    changes: Mapping[str, Change],
    dtype: str,
    replaced: Mapping[str, Source],
    of_adapter: bool,
) -> Merged:
    """Tensor by tensor; a head that was the embedding becomes one of its own where only one of them is changed.

    An adapter changes what tokens are read as, or what they are compared with; weights trained whole are both.
    """

    def planned(name: str, tensor: Stored) -> Planned:
        source: Source = replaced.get(name, tensor)
        if name in changes:
            source = changes[name](source)
        keeps = dtype == "own" or tensor.dtype not in BYTES
        return Planned(tensor.dtype if keeps else DTYPES[dtype], source)

    tensors = {name: planned(name, tensor) for name, tensor in stored.items()}
    embedding, head = embedding_and_head(stored)
    tied = (
        bool(embedding)
        and not config.get("is_encoder_decoder")
        and (head not in stored or config.get("tie_word_embeddings") is True)
    )
    grown = bool(embedding) and tensors[embedding].source.shape[0] != stored[embedding].shape[0]
    apart = head in changes or (embedding in changes and not grown)
    if tied and of_adapter and apart and changes.get(head) is not changes.get(embedding):
        tensors[head] = planned(head, stored[embedding])
        config = {**config, "tie_word_embeddings": False}
    if grown:
        config = _with_vocabulary(config, tensors[embedding].source.shape[0])
    if dtype != "own":
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    return Merged(tensors, config)


def _with_vocabulary(config: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        return {**config, "text_config": {**text, "vocab_size": tokens}}
    return {**config, "vocab_size": tokens}
