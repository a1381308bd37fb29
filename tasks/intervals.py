"""Figures of a sample with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.evaluate_params import Evaluate

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Interval(NamedTuple):
    """A figure, such as a mean, with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def means(drawn: NDArray[Any]) -> NDArray[Any]:
    """The mean of each sample, (samples, rows) to (samples,)."""
    found: NDArray[Any] = drawn.mean(axis=1)
    return found


def bootstrap(
    sample: Sequence[Any], params: Evaluate, figure: Callable[[NDArray[Any]], NDArray[Any]] = means
) -> Interval:
    """A figure of some rows with its percentile bootstrap interval (Efron 1979).

    Args:
        sample: a number for each row, or several: (rows,) or (rows, numbers).
        params: how often rows are drawn with replacement, the seed, and the confidence.
        figure: from drawn samples, (samples, rows) or (samples, rows, numbers), to a figure of each, (samples,).
    """
    import numpy as np

    values = np.asarray(sample, dtype=float)
    draws = np.random.default_rng(params.seed).integers(0, len(values), (params.bootstrap_samples, len(values)))
    tail = (1 - params.confidence) / 2
    low, high = np.quantile(figure(values[draws]), [tail, 1 - tail])
    return Interval(float(figure(values[None])[0]), float(low), float(high))
