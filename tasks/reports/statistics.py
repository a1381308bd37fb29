"""Statistics of evaluations: bootstrap intervals, and the paired difference of two models with its noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Resampling(NamedTuple):
    """Settings of a bootstrap: how rows are drawn with replacement, and an interval's confidence.

    Attributes:
        samples: how often as many rows are drawn as there are.
        seed: of the draws.
        confidence: the share of samples that lies within an interval.
    """

    samples: int
    seed: int
    confidence: float


class Interval(NamedTuple):
    """A figure, such as a mean, with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def means(drawn: NDArray[Any]) -> NDArray[Any]:
    """Compute the mean of each sample, (samples, rows) to (samples,)."""
    found: NDArray[Any] = drawn.mean(axis=1)
    return found


def bootstrap(
    sample: Sequence[Any], resampling: Resampling, figure: Callable[[NDArray[Any]], NDArray[Any]] = means
) -> Interval:
    """Compute a figure of some rows with its percentile bootstrap interval (Efron 1979).

    Args:
        sample: a number for each row, or several: (rows,) or (rows, numbers).
        resampling: how rows are drawn.
        figure: from drawn samples, (samples, rows) or (samples, rows, numbers), to a figure of each, (samples,).
    """
    import numpy as np

    values = np.asarray(sample, dtype=float)
    draws = np.random.default_rng(resampling.seed).integers(0, len(values), (resampling.samples, len(values)))
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(figure(values[draws]), [tail, 1 - tail])
    return Interval(float(figure(values[None])[0]), float(low), float(high))


_AT_ONCE = 1 << 21
"""Numbers that are drawn at once, at most."""


class Difference(NamedTuple):
    """Difference of two models' figures; a gain is positive where the first is better.

    Attributes:
        items: how many independent observations it rests on: the items that both answered, or people.
        new: the first model's figure.
        old: the second's.
        gain: how much better the first is.
        low: the bootstrap interval of the gain.
        high: its upper end.
        noise: what a gain or loss reaches by chance.
    """

    items: int
    new: float
    old: float
    gain: float
    low: float
    high: float
    noise: float

    @property
    def counted(self) -> float:
        """Return the gain if it counts, else 0; NaN when there is none."""
        if math.isnan(self.gain) or math.isnan(self.noise):
            return math.nan
        beyond = abs(self.gain) > self.noise * (1 + 1e-9) and not self.low <= 0 <= self.high
        return self.gain if beyond else 0.0


def paired_difference(
    values: NDArray[np.float64], weights: NDArray[np.float64], resampling: Resampling, *, higher_is_better: bool
) -> Difference:
    """Compare two models on the items that both answered.

    The figure of a model is the sum of its values over the sum of its weights. The gain has a percentile bootstrap
    interval over items; the noise floor is the quantile of the gains' sizes when a coin decides, item by item, which
    model gets which result (a permutation test's null distribution, with the observed gain among it).

    Args:
        values: (2, items) of the two models, higher where the gain is to be positive.
        weights: (2, items), what their sums are divided by; ones for a mean.
        resampling: how items are drawn.
        higher_is_better: whether the figures are shown as they are, or with their sign turned.

    Returns:
        NaN everywhere when there are no items, or numbers that are not finite.
    """
    import numpy as np

    items = values.shape[1]
    if not items or not np.isfinite(values).all() or not (weights > 0).all():
        return Difference(items, *(math.nan,) * 6)
    shown = 1 if higher_is_better else -1
    first, second = (values.sum(1) / weights.sum(1)).tolist()
    drawn, swapped = _resampled(values, weights, resampling)
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    noise = np.quantile(np.abs(np.append(swapped, first - second)), resampling.confidence, method="higher")
    return Difference(items, shown * first, shown * second, first - second, float(low), float(high), float(noise))


def _resampled(
    values: NDArray[np.float64], weights: NDArray[np.float64], resampling: Resampling
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the gain in items drawn with replacement, and with results swapped at random: (samples,) each.

    Args:
        values: (2, items) of the two models.
        weights: (2, items), what their sums are divided by.
        resampling: how often, and the seed.
    """
    import numpy as np

    random, items = np.random.default_rng(resampling.seed), values.shape[1]
    drawn, swapped = [], []
    step = max(1, _AT_ONCE // items)
    for start in range(0, resampling.samples, step):
        shape = (min(step, resampling.samples - start), items)
        places = random.integers(0, items, shape)
        first, second = (v[places].sum(1) / w[places].sum(1) for v, w in zip(values, weights, strict=True))
        drawn.append(first - second)
        turned = random.random(shape) < 0.5
        moved, heavier = turned @ (values[1] - values[0]), turned @ (weights[1] - weights[0])
        swapped.append(
            (values[0].sum() + moved) / (weights[0].sum() + heavier)
            - (values[1].sum() - moved) / (weights[1].sum() - heavier)
        )
    return np.concatenate(drawn), np.concatenate(swapped)
