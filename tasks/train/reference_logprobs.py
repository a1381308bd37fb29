"""The reference that a policy is held to: log-probabilities of replies by the base without what is trained on it.

Either the adapter is switched off whenever they are needed, or all are computed once, before the first step, and kept
in memory and beside the checkpoints.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from tasks.core.artifacts import atomic_folder, read_manifest
from tasks.core.errors import BadData
from tasks.core.ranks import is_first, world
from tasks.engine.collectives import all_reduce, share_of_rank
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.device import host_read, upload
from tasks.models.loader import Model

if TYPE_CHECKING:
    from torch import Tensor

Reference: TypeAlias = "Callable[[Sequence[TokenRow]], Tensor]"
"""The log-probability of each row's scored tokens together, nats, (rows,), float32, without a gradient."""

_FILE, _DIGEST_BYTES = "reference.safetensors", 16


def sums_of(model: Model, rows: Sequence[TokenRow], rows_at_once: int) -> Tensor:
    """Compute the log-probability of each row's scored tokens together, (rows,), without dropout and gradients."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            starts = range(0, len(rows), rows_at_once)
            return torch.cat([score_tokens(model, rows[s : s + rows_at_once]).row_sums() for s in starts])
    finally:
        model.train(training)


def sums_by_all(of: Reference, rows: Sequence[TokenRow], rows_at_once: int) -> Tensor:
    """Compute what `of` gives some rows, in forward passes of `rows_at_once`, (rows,); processes share the rows."""
    places = share_of_rank(range(len(rows)), rows_at_once, world())
    own = [of([rows[place] for place in part]) for part, _ in places]
    found = own[0].new_zeros(len(rows))
    for (part, counts), sums in zip(places, own, strict=True):
        if counts:
            found.index_copy_(0, upload(list(part), found.device), sums)
    return all_reduce(found)


def adapter_off(model: Any, micro_batch: AdaptiveMicroBatch) -> Reference:
    """Build the reference that is the base under an adapter, computed on each call; `model` is a PeftModel."""

    def reference(rows: Sequence[TokenRow]) -> Tensor:
        with switched_off(model):
            return sums_of(model, rows, micro_batch.rows)

    return reference


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Switch a PeftModel's adapter off within this block, so that it is its base."""
    trained = {p: p.requires_grad for p in model.parameters()}
    with model.disable_adapter():
        yield
    for parameter, was in trained.items():  # PEFT would let all of the adapter be trained from here on
        parameter.requires_grad_(was)


def precomputed(model: Model, rows: Iterable[TokenRow], rows_at_once: int, kept: Path) -> Reference:
    """Precompute the base's log-probabilities of these rows: each once, over all epochs and retries.

    Args:
        model: the model before its first step: without an adapter it is the reference itself.
        rows: all rows that will be needed; those that are the same are computed once.
        rows_at_once: rows in a forward pass.
        kept: the folder where the numbers are kept; if it is there already and whole, they are read.
    """
    import torch
    from peft import PeftModel

    known = _read(kept)
    unique: dict[bytes, TokenRow] = {}
    for row in rows:
        unique.setdefault(_digest(row), _packed(row))
    if unique.keys() - known.keys():
        ordered = sorted(unique.items(), key=lambda item: (item[1].tokens, item[0]))
        with switched_off(model) if isinstance(model, PeftModel) else nullcontext():
            found = sums_by_all(
                lambda some: sums_of(model, [_unpacked(row) for row in some], rows_at_once),
                [row for _, row in ordered],
                rows_at_once,
            )
        with host_read("the reference of all rows, once"):
            sums = found.cpu()
        known = dict(zip([digest for digest, _ in ordered], sums, strict=True))
        if is_first():
            _write(kept, known)

    def reference(asked: Sequence[TokenRow]) -> Tensor:
        return torch.stack([known[_digest(row)] for row in asked])

    return reference


def _digest(row: TokenRow) -> bytes:
    return blake2b(array("q", [row.prompt_tokens, *row.ids]).tobytes(), digest_size=_DIGEST_BYTES).digest()


def _packed(row: TokenRow) -> TokenRow:
    """Pack a row: 5 bytes a token instead of 40."""
    return row._replace(ids=array("i", row.ids), mask=cast("Sequence[bool]", bytes(row.mask)))


def _unpacked(row: TokenRow) -> TokenRow:
    return row._replace(ids=list(row.ids), mask=[bool(counts) for counts in row.mask])


def _write(folder: Path, known: dict[bytes, Tensor]) -> None:
    import torch
    from safetensors.torch import save_file

    digests = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8).view(len(known), _DIGEST_BYTES)
    with atomic_folder(folder) as draft:
        save_file({"digest": digests, "logp": torch.stack(list(known.values()))}, draft / _FILE)


def _read(folder: Path) -> dict[bytes, Tensor]:
    from safetensors.torch import load_file

    if not folder.is_dir():
        return {}
    try:
        read_manifest(folder)
    except BadData as error:
        print(f"the reference is computed again: {error}", flush=True)
        return {}
    tensors = load_file(folder / _FILE)
    return {bytes(digest.tolist()): logp for digest, logp in zip(tensors["digest"], tensors["logp"], strict=True)}
