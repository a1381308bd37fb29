"""Safetensors files, read block by block, without a model and without torch.

A tensor is seen as rows: (rows, columns), where the last axis is the columns and all others together the rows. Numbers
are computed with in float32 and rounded once, to nearest, ties to even, when they are written (`safetensors_writer`).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from operator import index as whole
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The number formats that are computed with, and the bytes of a number."""

MIB = 1 << 20

_MOST_HEADER_BYTES = 100_000_000
"""What the format itself allows."""
_BLOCK_NUMBERS = 1 << 18
"""So many numbers of a tensor are worked on at a time: a MiB in float32, which stays in a core's cache."""


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: which.
        dtype: as safetensors calls it, such as BF16.
        shape: of the tensor.
        start: where its bytes begin in the file.
        nbytes: how many they are.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Return the product of all axes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Return the length of the last axis; 1 for a single number."""
        return self.shape[-1] if self.shape else 1

    def floats(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read some of the rows, (rows, columns), float32.

        Raises:
            BadModel: these are no floating-point numbers, or the file ends before them.
        """
        import numpy as np

        if self.dtype not in BYTES:
            raise BadModel(
                "is no tensor to compute with", where=str(self.file), got=self.dtype, expected=", ".join(BYTES)
            )
        stop = self.rows if stop is None else stop
        line = self.columns * BYTES[self.dtype]
        raw = np.empty((stop - start) * line, dtype=np.uint8)
        with self.file.open("rb", buffering=0) as file:
            read_into(file.fileno(), raw.data, self.start + start * line, self.file)
        return widened(raw, self.dtype).reshape(stop - start, self.columns)


class TensorSource(Protocol):
    """Source of the numbers of a tensor that is written."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows, (rows, columns), float32."""


def blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the rows of a tensor in runs that are worked on at a time."""
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    step = max(1, _BLOCK_NUMBERS // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


# --- reading ----------------------------------------------------------------------------------------------------------


def stored_in(folder: Path) -> dict[str, StoredTensor]:
    """Find all tensors of a model folder by name, in the order in which they lie in its files.

    Raises:
        BadModel: there are none, a file is cut or no safetensors file, one that the index names is missing or does not
            hold what the index says, or two hold the same tensor.
    """
    index = folder / INDEX
    named = weight_map(index) if index.is_file() else {}
    files = sorted({folder / name for name in named.values()} or folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.is_file()]:
        raise BadModel(
            "a shard named in the index is missing", where=str(folder), examples=missing, fix="fetch it again"
        )
    if not files:
        raise BadModel("has no weights", where=str(folder), expected="*.safetensors")
    found: dict[str, StoredTensor] = {}
    for file in files:
        tensors = read_header(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise BadModel("holds a tensor that another file holds too", where=str(file), examples=twice)
        found |= tensors
    if absent := [f"{name}: not in {file}" for name, file in named.items() if name not in found]:
        raise BadModel("the index names tensors that no file holds", where=str(index), examples=absent)
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Read which file of a folder holds each tensor from its index.

    Raises:
        BadModel: it does not list that, or names files elsewhere.
    """
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(n, str) and n == Path(n).name for n in found.values()):
        raise BadModel("is no index of weights", where=str(index), expected="weight_map: each tensor's file beside it")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file: its tensors by name, in the order of their bytes.

    Raises:
        BadModel: the header is longer than the file, not in the format, or lists bytes that are not there.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise BadModel(
                "is cut, or no safetensors file",
                where=str(file),
                got=f"the header says {length} bytes, the file has {size}",
                fix="fetch it again",
            )
        text = opened.read(length)
    try:
        header: dict[str, Any] = dict(json.loads(text).items())
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file, str(entry["dtype"]), tuple(map(whole, entry["shape"])), 8 + length + begin, end - begin
            )
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadModel("has a header that is none", where=str(file), got=str(error), fix="fetch it again") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    _check_layout(file, ordered, size, 8 + length)
    return ordered


def _check_layout(file: Path, tensors: Mapping[str, StoredTensor], size: int, first: int) -> None:
    """Refuse tensors that overlap, leave gaps, have another size than their shape, or end beyond the file."""
    place = first
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape) * BYTES.get(tensor.dtype, 0)
        if tensor.start != place or tensor.nbytes < 0 or count not in (0, tensor.nbytes):
            raise BadModel("has a header that does not fit its tensors", where=str(file), examples=[name])
        place += tensor.nbytes
    if place != size:
        raise BadModel(
            "is cut, or longer than its header says",
            where=str(file),
            got=f"{size} bytes",
            expected=f"{place} bytes",
            fix="fetch it again",
        )


def read_into(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
    """Fill a buffer with the bytes of an open file from an offset on.

    Raises:
        BadModel: the file ends before that.
    """
    while len(target):
        got = os.preadv(descriptor, [target], offset)
        if not got:
            raise BadModel("ends before its tensors do", where=str(file), fix="fetch it again")
        target, offset = target[got:], offset + got


# --- number formats ---------------------------------------------------------------------------------------------------


def widened(raw: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Widen bytes of a dtype to float32, exactly (but for float64, which is rounded)."""
    import numpy as np

    if dtype == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32)
        bits <<= 16  # a bfloat16 is the upper half of a float32
        return bits.view(np.float32)
    if dtype == "F64":
        return _from_float64(raw.view(np.float64))
    numbers: NDArray[Any] = raw.view({"F32": np.float32, "F16": np.float16}[dtype])
    return numbers.astype(np.float32, copy=False)


def rounded(numbers: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 as the bytes of a number format, rounded to nearest, ties to even.

    Raises:
        BadModel: a number is not finite, or too large for the format.
    """
    import numpy as np

    flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1)
    if dtype == "BF16":
        bits = flat.view(np.uint32)
        odd = bits >> 16
        odd &= 1
        odd += 0x7FFF
        odd += bits  # carries into the upper half where the lower one is above a half, or is one and the upper odd
        odd >>= 16
        narrow = odd.astype(np.uint16)
        finite = bool((narrow & 0x7FFF).max(initial=0) < 0x7F80)
    else:
        with np.errstate(over="ignore"):
            narrow = _to_float64(flat) if dtype == "F64" else flat.astype({"F32": np.float32, "F16": np.float16}[dtype])
        finite = bool(np.isfinite(narrow).all())
    if not finite:
        lost = not np.isfinite(flat).all()
        raise BadModel(
            f"holds numbers that are not finite in {dtype}",
            got="NaN or infinity" if lost else f"the largest is {np.abs(flat).max():g}",
            fix="" if lost else "choose a format with a larger range, such as BF16",
        )
    return narrow.view(np.uint8)


# A processor that was told to flush subnormal numbers (`seed_everything`) takes float32 below 2^-126 for zero when it
# converts them. As whole multiples of 2^-149, the least of them, they are normal numbers in float64.


def _to_float64(numbers: NDArray[Any]) -> NDArray[Any]:
    """Convert float32 to float64, exactly."""
    import numpy as np

    bits, wide = numbers.view(np.uint32), numbers.astype(np.float64)
    small = (bits & 0x7F800000) == 0
    wide[small] = np.copysign(np.ldexp((bits[small] & 0x7FFFFF).astype(np.float64), -149), numbers[small])
    return wide


def _from_float64(numbers: NDArray[Any]) -> NDArray[Any]:
    """Convert float64 to float32, rounded to nearest, ties to even."""
    import numpy as np

    narrow = numbers.astype(np.float32)
    small = np.abs(numbers) < 2.0**-126
    multiples = np.rint(np.ldexp(np.abs(numbers[small]), 149)).astype(np.uint32)
    narrow.view(np.uint32)[small] = multiples | np.signbit(numbers[small]).astype(np.uint32) << 31
    return narrow
