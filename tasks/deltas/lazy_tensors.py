"""Tensors that are made block by block of others: what merging an adapter comes to, without a model and without torch.

Everything here is a `TensorSource` of rows in float32. It reads what it needs when it is asked for rows, so that
memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from tasks.models.safetensors_reader import StoredTensor, TensorSource, blocks

Change: TypeAlias = "Callable[[TensorSource], TensorSource]"
"""From a weight of the base to what takes its place."""

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class ComputedTensor:
    """A tensor that is made when its rows are asked for; of all such tensors the last one is kept.

    Args:
        make: gives the tensor, float32, on the CPU.
        shape: of it.
    """

    _lock = Lock()
    _last: tuple[ComputedTensor | None, NDArray[Any] | None] = (None, None)

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> None:
        self._make, self.shape = make, shape

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        rows: NDArray[Any] = self._numbers().reshape(-1, self.shape[-1])[start:stop]
        return rows

    @staticmethod
    def forget() -> None:
        """Release the last tensor, and what it was made from."""
        with ComputedTensor._lock:
            ComputedTensor._last = (None, None)

    def _numbers(self) -> NDArray[Any]:
        with ComputedTensor._lock:
            whose, numbers = ComputedTensor._last
            if whose is not self or numbers is None:
                numbers = self._make().numpy()
                ComputedTensor._last = (self, numbers)
            return numbers


@dataclass(frozen=True)
class Factor:
    """A matrix of an adapter, read when it is needed; `turned` says that it is used the other way round."""

    stored: StoredTensor
    turned: bool = False
    scale: float = 1.0
    by_row: StoredTensor | None = None
    """Factors of the rows as they are stored."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        if self.turned or self.by_row:
            return self.whole()[start:stop]
        return self.stored.floats(start, stop) * self.scale

    def whole(self) -> NDArray[Any]:
        """Return all of its rows."""
        numbers = self.stored.floats()
        if self.by_row:
            numbers = numbers * self.by_row.floats().reshape(-1, 1)
        found: NDArray[Any] = (numbers.T if self.turned else numbers) * self.scale
        return found


@dataclass(frozen=True)
class OfShape:
    """Base class of sources that keep the shape of the source that they change."""

    base: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self.base.shape


@dataclass(frozen=True)
class Added(OfShape):
    """base + left @ right; (rows, rank) and (rank, columns)."""

    left: Factor
    right: Factor

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        total: NDArray[Any] = self.left.rows(start, stop) @ self.right.whole()
        total += self.base.floats(start, stop)
        return total


@dataclass(frozen=True)
class AddedExperts(OfShape):
    """The same for each expert of a fused weight, (experts, rows, columns): PEFT's LoRA of a parameter.

    Attributes:
        base: the weight of all experts, or of those from `first` on.
        a: (experts * rank, in).
        b: (out, rank * experts): the experts of a rank stand beside each other.
        experts: how many the factors are of.
        scale: of the update.
        turned: whether an expert's weight is (in, out).
        first: the first expert that the base has.
        rows_from: the first row of an expert's update that the base has.
    """

    a: StoredTensor
    b: StoredTensor
    experts: int
    scale: float
    turned: bool = False
    first: int = 0
    rows_from: int = 0

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        total = self.base.floats(start, stop)
        height = self.shape[-2]
        for expert in range(start // height, (stop - 1) // height + 1):
            begin, end = max(start, expert * height), min(stop, (expert + 1) * height)
            update = self._update(self.first + expert)[self.rows_from :]
            total[begin - start : end - start] += update[begin - expert * height : end - expert * height]
        return total

    def _update(self, expert: int) -> NDArray[Any]:
        rank = self.a.shape[0] // self.experts
        a = self.a.floats(expert * rank, (expert + 1) * rank)
        b = self.b.floats().reshape(self.b.shape[0], rank, self.experts)[:, :, expert]
        update: NDArray[Any] = self.scale * (b @ a)
        return update.T if self.turned else update


@dataclass(frozen=True)
class Normed(OfShape):
    """Each output of a weight with the norm that DoRA (arXiv:2402.09353, equation 5) trained for it, (out,).

    `turned` says that the weight is (in, out), so that the norms are those of columns.
    """

    norms: StoredTensor
    turned: bool

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        import numpy as np

        rows = self.base.floats(start, stop)
        trained = self.norms.floats().reshape(-1)
        if not self.turned:
            factors = (trained[start:stop] / np.linalg.norm(rows, axis=1))[:, None]
        else:
            factors = trained / self._lengths
        found: NDArray[Any] = rows * factors
        return found

    @cached_property
    def _lengths(self) -> NDArray[Any]:
        """Compute the lengths (L2 norms) of the columns, (columns,)."""
        import numpy as np

        squares = np.zeros(self.shape[-1])
        for block in blocks(self.shape):
            squares += np.square(self.base.floats(*block), dtype=np.float64).sum(axis=0)
        found: NDArray[Any] = np.sqrt(squares).astype(np.float32)
        return found


@dataclass(frozen=True)
class Scaled(OfShape):
    """A weight times factors of its rows, (rows, 1), or of its columns, (1, columns)."""

    factors: StoredTensor
    by_row: bool

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        factors, rows = self.factors.floats().reshape(-1), self.base.floats(start, stop)
        if len(self.shape) > 1:
            factors = factors[start:stop, None] if self.by_row else factors[None]
        found: NDArray[Any] = rows * factors
        return found


@dataclass(frozen=True)
class Plus(OfShape):
    """A bias and numbers of the same shape that are added to it, times a factor."""

    more: TensorSource
    scale: float

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        total: NDArray[Any] = self.base.floats(start, stop) + self.scale * self.more.floats(start, stop)
        return total


@dataclass(frozen=True)
class Part:
    """One of several equal parts of a source's rows."""

    whole: TensorSource
    number: int
    of: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return (self.whole.shape[0] // self.of, *self.whole.shape[1:])

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        first = self.number * math.prod(self.shape[:-1])
        return self.whole.floats(first + start, first + stop)


@dataclass(frozen=True)
class Stacked:
    """Rows of several sources, one below the other: parts of a weight, or an embedding and those of added tokens."""

    parts: tuple[TensorSource, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """All together."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        import numpy as np

        found, first = [], 0
        for part in self.parts:
            rows = math.prod(part.shape[:-1])
            if start < first + rows and stop > first:
                found.append(part.floats(max(start - first, 0), min(stop - first, rows)))
            first += rows
        return np.concatenate(found)


@dataclass(frozen=True)
class Rows(OfShape):
    """A weight of which some rows were trained anew: PEFT's trainable tokens."""

    places: tuple[int, ...]
    trained: StoredTensor

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        """Return some of its rows."""
        rows = self.base.floats(start, stop)
        for number, place in enumerate(self.places):
            if start <= place < stop:
                rows[place - start] = self.trained.floats(number, number + 1)
        return rows
