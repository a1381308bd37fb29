"""The files of a merged model: what becomes of each tensor of the base, and of what lies beside the weights.

The model is never in memory: tensors are read, changed and written block by block.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tasks.adapters.files import CONFIG
from tasks.core.artifacts import as_json, digest, read_object
from tasks.core.errors import BadModel
from tasks.core.progress import Progress
from tasks.deltas.base_tensors import by_names_in_memory, is_tied, with_head
from tasks.deltas.lazy_tensors import Change, ComputedTensor
from tasks.deltas.weight_deltas import changes_of, embedding_and_head
from tasks.merge.safetensors_writer import Planned, write_shards
from tasks.models.loader import model_files
from tasks.models.safetensors_reader import BYTES, INDEX, StoredTensor, TensorSource, stored_in
from tasks.tokenization.model_config import refuse_code

ORIGINAL, DEQUANTIZED = "original", "dequantized"
"""What the update of a quantized base may be added to: its own weights, or what their quantized form stands for."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Number formats that a merged model may have, and what safetensors calls them."""

_BRINGS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A folder with one of these brings a tokenizer of its own."""
_TOKENIZER = (*_BRINGS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_TEMPLATE = "chat_template.jinja"


class Merged(NamedTuple):
    """A model that is to be written: its tensors, and its config.json."""

    tensors: dict[str, Planned]
    config: dict[str, Any]


def merge(
    base: Path, adapter: Path, dtype: str = "own", replaced: Mapping[str, TensorSource] = MappingProxyType({})
) -> Merged:
    """Build the merged tensors of a base and an adapter.

    Args:
        base: a model folder.
        adapter: the folder of a published adapter, or of weights that were trained whole.
        dtype: a key of DTYPES, or `own`: every tensor keeps its format.
        replaced: what stands in for weights of the base before they are changed, by name.

    Raises:
        BadModel: one of them is unsafe, torn, quantized, or they do not fit each other.
    """
    config, stored = _base(base)
    tensors, family = with_head(stored, config), str(config.get("model_type"))
    if not (adapter / CONFIG).is_file():  # weights that were trained whole have the names of files
        return _merged(config, stored, changes_of(adapter, tensors, family), dtype, replaced, False)
    changes = by_names_in_memory(base, tensors, lambda named: changes_of(adapter, named, family))
    return _merged(config, stored, changes, dtype, replaced, True)


def merge_changes(
    base: Path, changes: Callable[[Mapping[str, StoredTensor], str], Mapping[str, Change]], dtype: str
) -> Merged:
    """Build the merged tensors of a base with changes that are computed for its tensors and its model_type."""
    config, stored = _base(base)
    family = str(config.get("model_type"))
    found = by_names_in_memory(base, with_head(stored, config), lambda named: changes(named, family))
    return _merged(config, stored, found, dtype, {}, True)


def write_merged(
    base: Path, adapter: Path, wanted: Mapping[Path, Merged], most_bytes: int
) -> dict[Path, dict[str, str]]:
    """Write merged models into existing folders, in one pass over the base; return the digests of their files.

    The tokenizer and the chat template are the adapter's, where its folder has a tokenizer; all else is the base's.
    """
    beside = {path.name: path for path in model_files(base) if path.suffix != ".safetensors" and path.name != INDEX}
    if brings_tokenizer(adapter):
        refuse_code(adapter / "tokenizer_config.json")
        beside = {name: path for name, path in beside.items() if name not in _TOKENIZER}
        beside |= {name: adapter / name for name in (*_TOKENIZER, _TEMPLATE) if (adapter / name).is_file()}
        if _TEMPLATE in beside and not (adapter / _TEMPLATE).is_file() and _has_template(adapter):
            del beside[_TEMPLATE]
    tensors = {folder: made.tensors for folder, made in wanted.items()}
    with Progress("merge", sum(map(len, tensors.values())), "tensors") as progress:
        digests = write_shards(tensors, most_bytes, progress.step)
    ComputedTensor.forget()
    for folder, made in wanted.items():
        for name, path in beside.items():
            shutil.copyfile(path, folder / name)
        (folder / "config.json").write_text(as_json(made.config))
        digests[folder] |= {name: digest(folder / name) for name in {*beside, "config.json"}}
    return digests


def brings_tokenizer(adapter: Path) -> bool:
    """Return whether an adapter's folder has its own tokenizer."""
    return any((adapter / name).is_file() for name in _BRINGS)


def _has_template(folder: Path) -> bool:
    """Return whether a tokenizer's configuration holds its chat template, as older ones do."""
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_object(path).get("chat_template"))


def _base(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
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
    stored: Mapping[str, StoredTensor],
    changes: Mapping[str, Change],
    dtype: str,
    replaced: Mapping[str, TensorSource],
    of_adapter: bool,
) -> Merged:
    """Tensor by tensor; a head that was the embedding becomes one of its own where only one of them is changed.

    An adapter changes what tokens are read as, or what they are compared with; weights trained whole are both.
    """

    def planned(name: str, tensor: StoredTensor) -> Planned:
        source: TensorSource = replaced.get(name, tensor)
        if name in changes:
            source = changes[name](source)
        keeps = dtype == "own" or tensor.dtype not in BYTES
        return Planned(tensor.dtype if keeps else DTYPES[dtype], source)

    tensors = {name: planned(name, tensor) for name, tensor in stored.items()}
    embedding, head = embedding_and_head(stored)
    grown = bool(embedding) and tensors[embedding].source.shape[0] != stored[embedding].shape[0]
    if is_tied(stored, config):
        apart = head in changes or (embedding in changes and not grown)
        if of_adapter and apart and changes.get(head) is not changes.get(embedding):
            tensors[head] = planned(head, stored[embedding])
            config = {**config, "tie_word_embeddings": False}
        else:
            tensors.pop(head, None)  # it would be another than the embedding
    elif head in stored and config.get("tie_word_embeddings") is True:  # the file says otherwise, and is believed
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
