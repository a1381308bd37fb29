"""Making do with less memory in a training: recomputed activations, fewer rows at once."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import atomic_write
from tasks.core.errors import BadModel, OutOfMemory
from tasks.core.memory import T, free_bytes, kills_for_memory, ran_out, readable_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


_OF_MALLOC = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
"""What malloc can be told, as malloc.h numbers it."""


def keep_freed_blocks() -> None:
    """Let glibc keep what a step frees for the next one, instead of giving it back and having it zeroed again.

    Tensors above 32 MiB are otherwise mapped anew every time: long rows took a sixth of their time for that
    (bench/LOG.md). What a process holds at most stays the same. Elsewhere than on glibc it does nothing.
    """
    set_malloc_option(mmap_max=0, trim_threshold=-1)  # never


def set_malloc_option(**settings: int) -> None:
    """Set the options of glibc's malloc by the names of `mallopt` without their M_; elsewhere do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(_OF_MALLOC[name], value)


def recompute_activations(model: PreTrainedModel | PeftModel) -> None:
    """Let layers keep their inputs alone and recompute the rest in the backward pass (arXiv:1604.06174).

    The same bits, for about a third more work. Keys and values that stand before the first token would get lost.

    Raises:
        BadModel: the architecture cannot.
    """
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise BadModel(
            "its activations cannot be computed again", where=type(model).__name__, got=str(error)
        ) from error
    model.disable_input_require_grads()  # what only the reentrant form needs


class AdaptiveMicroBatch:
    """Row count of a forward pass: halved when memory runs out, where params allow it.

    Args:
        rows: the row count in the beginning.
        fit: whether they may be halved.
        file: where the next attempt finds the row count; without one it begins anew.
    """

    def __init__(self, rows: int, *, fit: bool, file: Path | None = None, recomputing: bool | None = None) -> None:
        self.rows, self._fit, self._file, self._recomputing = rows, fit, file, recomputing

    def recomputing(self, must: Callable[[], bool]) -> bool:
        """Return whether activations are recomputed: as `must` returns at the first attempt, to keep the same bits."""
        if not self._fit:
            return False
        if self._recomputing is None:
            self._recomputing = must()
            self.note(kills_for_memory())
        return self._recomputing

    def fitted(self, work: Callable[[], T]) -> T:
        """Run some work, again from its beginning with half the rows each time that memory runs out.

        That ends: there are at most log2(rows) halves. What failed holds no memory any more when it is tried again.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not (ran_out(error) and self.halve(str(error).split("\n")[0])):
                    raise
            _give_back()

    def halve(self, why: str) -> bool:
        """Halve the rows and print so; return False when they may not be halved, or are one."""
        if not self._fit or self.rows == 1:
            return False
        self.rows //= 2
        print(f"memory ran out ({why}); going on with micro_batch_size={self.rows}: the same gradients", flush=True)
        self.note(kills_for_memory())
        return True

    def note(self, kills: int | None) -> None:
        """Record the row count for the next attempt; `kills` is None once this one has ended by itself."""
        if self._file:
            attempt = {"micro_batch_size": self.rows, "recomputing": self._recomputing, "kills_for_memory": kills}
            atomic_write(self._file, json.dumps(attempt) + "\n")


@contextmanager
def adaptive_micro_batch(rows: int, *, fit: bool, checkpoints: Path) -> Iterator[AdaptiveMicroBatch]:
    """Yield the row count of a forward pass of one attempt, which learns from the attempts before it.

    If the last one ended without a record, and the kernel has ended a process for its memory since, it was that one.

    Raises:
        OutOfMemory: it was, and it took one row at once already.
    """
    if not fit:
        yield AdaptiveMicroBatch(rows, fit=False)
        return
    file = checkpoints / "attempt.json"
    last: dict[str, Any] = {"micro_batch_size": rows, "recomputing": None, "kills_for_memory": None}
    if file.is_file():
        last = json.loads(file.read_text())
    now = AdaptiveMicroBatch(min(rows, last["micro_batch_size"]), fit=True, file=file, recomputing=last["recomputing"])
    killed = last["kills_for_memory"] is not None and kills_for_memory() > last["kills_for_memory"]
    if killed and not now.halve("the kernel ended the last attempt for it"):
        now.note(None)
        raise OutOfMemory(
            "the kernel ended the last attempt for its memory, with one row in a forward pass",
            where=str(checkpoints),
            got=f"{readable_bytes(free_bytes())} free",
            fix="free some memory, or take a machine with more; `temper estimate` says what would fit",
        )
    now.note(kills_for_memory())
    try:
        yield now
    finally:
        now.note(None)


def _give_back() -> None:
    """Free what a failed attempt held: cycles of tensors, and the GPU's cache."""
    import gc

    import torch

    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # see keep_freed_memory
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
