"""Safetensors files, written block by block: what is not changed is copied by the kernel, the rest rounded once.

Blocks are made by several threads, and written in their order; each file's SHA-256 is computed beside that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from tasks.core.artifacts import as_json
from tasks.core.errors import BadModel
from tasks.models.safetensors_reader import BYTES, INDEX, SINGLE, StoredTensor, TensorSource, blocks, read_into, rounded

_COPY_BYTES = 1 << 22
_SYNC_SECONDS = 0.03
"""So often the disk is asked to write what is there."""
_WORKERS = min(4, os.cpu_count() or 1)


class Planned(NamedTuple):
    """A tensor to write: a stored one as it is, or numbers rounded to a format."""

    dtype: str
    source: TensorSource

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in the file, in bytes."""
        if isinstance(self.source, StoredTensor) and self.is_copy:
            return self.source.nbytes
        return math.prod(self.source.shape) * BYTES[self.dtype]

    @property
    def is_copy(self) -> bool:
        """Return whether the tensor's bytes are those of a file."""
        return isinstance(self.source, StoredTensor) and self.source.dtype == self.dtype


def plan_shards(planned: Mapping[str, Planned], most_bytes: int) -> list[dict[str, Planned]]:
    """Split the tensors in order into shards of at most `most_bytes`; a larger tensor has a separate shard."""
    shards: list[dict[str, Planned]] = []
    filling, room = dict[str, Planned](), most_bytes
    for name, tensor in planned.items():
        if tensor.nbytes > most_bytes:
            shards.append({name: tensor})
            continue
        if tensor.nbytes > room:
            shards.append(filling)
            filling, room = {}, most_bytes
        filling[name] = tensor
        room -= tensor.nbytes
    return [*shards, filling] if filling else shards


def write_shards(
    wanted: Mapping[Path, Mapping[str, Planned]], most_bytes: int, step: Callable[[], None] = lambda: None
) -> dict[Path, dict[str, str]]:
    """Write tensors as the weights of one or several model folders, in one pass, with an index for several files.

    Args:
        wanted: for each existing folder the tensors by name; all have the same names, shapes and formats.
        most_bytes: the largest size of a shard.
        step: called for every tensor that was written.

    Returns:
        For each folder the SHA-256 of every file that was written, by its name.

    Raises:
        BadModel: a number is not finite in its format.
    """
    first = next(iter(wanted.values()))
    shards = plan_shards(first, most_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    digests: dict[Path, dict[str, str]] = {folder: {} for folder in wanted}
    for name, shard in zip(names, shards, strict=True):
        parts = {folder / name: {tensor: tensors[tensor] for tensor in shard} for folder, tensors in wanted.items()}
        for path, digest in write_files(parts, step).items():
            digests[path.parent][name] = digest
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in first.values())},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        text = as_json(content).encode()
        for folder in wanted:
            (folder / INDEX).write_bytes(text)
            digests[folder][INDEX] = hashlib.sha256(text).hexdigest()
    return digests


def write_files(
    wanted: Mapping[Path, Mapping[str, Planned]], step: Callable[[], None] = lambda: None
) -> dict[Path, str]:
    """Write safetensors files of the same layout, tensor by tensor in all of them; return their SHA-256."""
    from threadpoolctl import threadpool_limits

    first = next(iter(wanted.values()))
    header = _header(first)
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1, user_api="blas"))  # blocks are small: threads work on several instead
        workers = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        files = {path: stack.enter_context(_Written(path)) for path in wanted}
        for file in files.values():
            file.write(memoryview(header))
        ahead: deque[Callable[[], None]] = deque()
        for name, path in product(first, wanted):
            for action in _writing(files[path], name, wanted[path][name], workers):
                ahead.append(action)
                if len(ahead) > 2 * _WORKERS:
                    ahead.popleft()()
            ahead.append(step)
        for action in ahead:
            action()
        return {path: file.digest() for path, file in files.items()}


def _header(planned: Mapping[str, Planned]) -> bytes:
    place, entries = 0, dict[str, Any](__metadata__={"format": "pt"})
    for name, tensor in planned.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.source.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight, as safetensors itself has it
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    try:
        yield
    except BadModel as error:
        raise error if error.where else BadModel(error.what, where=name, got=error.got, fix=error.fix) from error


def _writing(file: _Written, name: str, tensor: Planned, workers: Executor) -> Iterator[Callable[[], None]]:
    """Yield the steps of writing a tensor, to be taken in order; blocks are computed once they are requested."""
    if isinstance(tensor.source, StoredTensor) and tensor.is_copy:
        yield partial(file.copy, tensor.source)
        return

    def made(start: int, stop: int) -> memoryview:
        return rounded(tensor.source.floats(start, stop), tensor.dtype).data

    def write(block: Future[memoryview]) -> None:
        with _told_of(name):
            file.write(block.result())

    for block in blocks(tensor.source.shape):
        yield partial(write, workers.submit(made, *block))


class _Written:
    """A file that is written, with its SHA-256, which a thread computes beside what makes the bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._state = hashlib.sha256()
        self._blocks: Queue[Any] = Queue(maxsize=4)
        self._thread = threading.Thread(target=self._work, name="digest", daemon=True)
        self._ended = threading.Event()
        self._syncing = ThreadPoolExecutor(1)

    def __enter__(self) -> _Written:
        self._thread.start()
        self._synced = self._syncing.submit(self._sync)
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._syncing.shutdown()
        self._file.close()

    def write(self, block: memoryview) -> None:
        """Write bytes, which must not be changed any more."""
        self._blocks.put(block)
        while len(block):
            block = block[os.write(self._file.fileno(), block) :]

    def copy(self, source: StoredTensor) -> None:
        """Copy a tensor's bytes within the kernel, where the file systems can, and read them for the digest."""
        with source.file.open("rb", buffering=0) as file:
            for offset in range(source.start, source.start + source.nbytes, _COPY_BYTES):
                block = memoryview(bytearray(min(_COPY_BYTES, source.start + source.nbytes - offset)))
                read_into(file.fileno(), block, offset, source.file)
                done = _copy_range(file.fileno(), self._file.fileno(), offset, len(block))
                if done:
                    self._blocks.put(block[:done])
                if done < len(block):
                    self.write(block[done:])

    def digest(self) -> str:
        """Return the digest of all that was written; nothing can be written any more.

        Raises:
            OSError: the disk could not write it. The kernel reports it once: a later sync would find nothing wrong.
        """
        self._end()
        self._synced.result()
        return self._state.hexdigest()

    def _end(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()

    def _sync(self) -> None:
        """Have the disk write what is there already, so that the sync at the end has little left to wait for."""
        while not self._ended.wait(_SYNC_SECONDS):
            os.fdatasync(self._file.fileno())

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._state.update(block)


def _copy_range(source: int, target: int, offset: int, length: int) -> int:
    """Copy bytes from file to file without passing them through this process; return how many it could."""
    done = 0
    while done < length:
        try:
            copied = os.copy_file_range(source, target, length - done, offset + done)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # these file systems cannot
                break
            raise
        if not copied:
            break
        done += copied
    return done
