"""The tensors of a base as adapters know them: by their names in memory, with a head that is tied to the embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.adapters.files import read_adapter_config
from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel
from tasks.deltas.lazy_tensors import Change, Part, Stacked
from tasks.deltas.weight_deltas import METHODS, changes_of, embedding_and_head
from tasks.models.file_names import names_in_memory
from tasks.models.safetensors_reader import StoredTensor, TensorSource, stored_in


def with_head(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return a base's tensors; a head tied to the embedding is listed with its tensor, whether it is stored or not."""
    embedding, head = embedding_and_head(stored)
    return {**stored, head: stored[embedding]} if is_tied(stored, config) else dict(stored)


def is_tied(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> bool:
    """Return whether a model's head is its embedding: as transformers decides, by the file where it holds both."""
    embedding, head = embedding_and_head(stored)
    if not embedding or config.get("is_encoder_decoder"):
        return False
    if head not in stored:
        return True
    return config.get("tie_word_embeddings") is True and _equal(stored[embedding], stored[head])


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare two tensors a few rows at a time."""
    import numpy as np

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    spans = ((start, min(start + _ROWS, one.rows)) for start in range(0, one.rows, _ROWS))
    return all(np.array_equal(one.floats(*span), other.floats(*span)) for span in spans)


_ROWS = 4096


def by_names_in_memory(
    base: Path, tensors: Mapping[str, StoredTensor], find: Callable[[Mapping[str, StoredTensor]], Mapping[str, Change]]
) -> dict[str, Change]:
    """Find changes of tensors by the names that these have in memory, as adapters do; return them by those of files."""
    names = names_in_memory(base, tensors)
    parts = {
        part: piece
        for name, tensor in tensors.items()
        for part, piece in zip(names[name], _cut(tensor, len(names[name])), strict=True)
    }
    found = find(parts)
    return {
        name: _together([found.get(part) for part in names[name]])
        for name in tensors
        if any(part in found for part in names[name])
    }


def _cut(tensor: StoredTensor, count: int) -> list[StoredTensor]:
    """Cut a stored tensor into equal parts of its rows."""
    if count == 1:
        return [tensor]
    if tensor.shape[0] % count:
        raise BadModel("has a tensor that is not of equal parts", where=str(tensor.file), got=str(tensor.shape))
    size, shape = tensor.nbytes // count, (tensor.shape[0] // count, *tensor.shape[1:])
    return [tensor._replace(shape=shape, start=tensor.start + n * size, nbytes=size) for n in range(count)]


def _together(changes: Sequence[Change | None]) -> Change:
    """Return the change of a whole tensor, of changes of equal parts of its rows."""
    if len(changes) == 1 and changes[0]:
        return changes[0]

    def change(source: TensorSource) -> TensorSource:
        parts = [Part(source, number, len(changes)) for number in range(len(changes))]
        return Stacked(tuple(each(part) if each else part for each, part in zip(changes, parts, strict=True)))

    return change


def check_mergeable(base: Path, adapter: Path) -> None:
    """Prove by names and shapes that an adapter can be folded into its base, before anything is trained of it.

    Adapters of methods that change no weights are published beside their base, and need no proof.

    Raises:
        BadModel: it could not be merged.
    """
    if read_adapter_config(adapter).get("peft_type") not in METHODS:
        return
    config = read_object(base / "config.json")
    tensors, family = with_head(stored_in(base), config), str(config.get("model_type"))
    changes = by_names_in_memory(base, tensors, lambda named: changes_of(adapter, named, family))
    grows = embedding_and_head(tensors)  # by the rows of added tokens
    wrong = [
        f"{name}: shape {tensors[name].shape}, changed to {change(tensors[name]).shape}"
        for name, change in changes.items()
        if name not in grows and change(tensors[name]).shape != tensors[name].shape
    ]
    if wrong:
        raise BadModel("could not be merged into its base", where=str(base), examples=wrong)
