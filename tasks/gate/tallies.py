"""Shares of yes among votes that are not independent: one user or conversation gives several, so they stand together.

A tally counts the units (users, or conversations of nobody named) by what each said: how often yes, of how many votes.
To draw as many units with replacement is to draw a multinomial over these counts, and to shuffle the units of two
tallies a multivariate hypergeometric: both are the bootstrap and the permutation of `tasks.reports.statistics`, of any
number of votes in the time of few. A tally is small enough for a verdict, which can so be computed again from itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from tasks.reports.statistics import Difference, Interval, Resampling, paired_difference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tally(NamedTuple):
    """Votes by unit.

    Attributes:
        cells: (yes, votes, units): so many units gave so many votes, so many of them yes; sorted, no two alike in the
            first two.
    """

    cells: tuple[tuple[int, int, int], ...] = ()

    @property
    def yes(self) -> int:
        """Return how many votes are yes."""
        return sum(yes * units for yes, _, units in self.cells)

    @property
    def votes(self) -> int:
        """Return how many votes there are."""
        return sum(votes * units for _, votes, units in self.cells)

    @property
    def units(self) -> int:
        """Return how many users or conversations gave them."""
        return sum(units for *_, units in self.cells)

    @property
    def share(self) -> float:
        """Return the share of yes among all votes; NaN without any."""
        return self.yes / self.votes if self.votes else math.nan

    def as_dict(self) -> dict[str, int]:
        """Return units by "yes/votes", as JSON has it."""
        return {f"{yes}/{votes}": units for yes, votes, units in self.cells}


def tallied(votes: Iterable[tuple[str, bool]]) -> Tally:
    """Count votes, each with the name of its unit."""
    yes, all_of = Counter[str](), Counter[str]()
    for unit, said in votes:
        yes[unit] += said
        all_of[unit] += 1
    return _tally(Counter((yes[unit], count) for unit, count in all_of.items()))


def tally_of(cells: Mapping[str, int]) -> Tally:
    """Read a tally back from what `Tally.as_dict` gives."""
    found: dict[tuple[int, int], int] = {}
    for cell, units in cells.items():
        yes, votes = map(int, cell.split("/"))
        found[yes, votes] = units
    return _tally(found)


def _tally(units: Mapping[tuple[int, int], int]) -> Tally:
    return Tally(tuple(sorted((yes, votes, count) for (yes, votes), count in units.items())))


def wilson(tally: Tally, confidence: float) -> Interval:
    """Compute a share with its score interval (Wilson 1927), which does not close up where all say the same.

    Votes of one unit resemble each other: their number is divided by the design effect, the variance of the share over
    units to that of as many independent votes (Rao and Scott 1992), at least 1. Where all say the same nothing is known
    of it, and each unit counts once. Of one vote a unit it is Wilson's interval itself.

    Returns:
        NaN without votes.
    """
    if not tally.votes:
        return Interval(*(math.nan,) * 3)
    share, votes = tally.share, tally.votes
    count: float = tally.units
    if 0 < share < 1:
        variance = math.fsum(units * (yes - share * given) ** 2 for yes, given, units in tally.cells) / votes**2
        count = min(votes, share * (1 - share) / variance) if variance else votes
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def share_difference(new: Tally, old: Tally, resampling: Resampling) -> Difference:
    """Compare the shares of two groups of units.

    The interval is the percentile bootstrap's, with units drawn from each group by themselves; the noise floor is what
    the difference reaches when the units are shuffled between the groups. A unit that is in both counts as two, which
    makes the interval wider and never narrower where its votes resemble each other.

    Returns:
        NaN everywhere when a group is empty.
    """
    import numpy as np

    if not new.votes or not old.votes:
        return Difference(new.units + old.units, *(math.nan,) * 6)
    random = np.random.default_rng(resampling.seed)
    drawn = _redrawn(new, random, resampling.samples) - _redrawn(old, random, resampling.samples)
    cells = sorted({cell[:2] for cell in (*new.cells, *old.cells)})
    both = Counter[tuple[int, int]]()
    for yes, votes, units in (*new.cells, *old.cells):
        both[yes, votes] += units
    pooled = np.array([both[cell] for cell in cells])
    # the method "count" takes memory of all units, "marginals" of the cells alone
    first = random.multivariate_hypergeometric(pooled, new.units, resampling.samples, method="marginals")
    shuffled = _shares(np.array(cells), first) - _shares(np.array(cells), pooled - first)
    gain, tail = new.share - old.share, (1 - resampling.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    noise = np.quantile(np.abs(np.append(shuffled, gain)), resampling.confidence, method="higher")
    return Difference(new.units + old.units, new.share, old.share, gain, float(low), float(high), float(noise))


def preference(wins: Tally, resampling: Resampling) -> Difference:
    """Compare how often each of two was preferred, of votes that each were given on both; units are what is paired.

    Returns:
        NaN everywhere without votes.
    """
    import numpy as np

    yes, votes = (np.repeat([cell[place] for cell in wins.cells], [cell[2] for cell in wins.cells]) for place in (0, 1))
    values, weights = np.stack([yes, votes - yes]).astype(float), np.stack([votes, votes]).astype(float)
    return paired_difference(values, weights, resampling, higher_is_better=True)


def _redrawn(tally: Tally, random: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """Compute the share in as many units drawn with replacement, (samples,)."""
    import numpy as np

    cells = np.array(tally.cells)
    return _shares(cells[:, :2], random.multinomial(tally.units, cells[:, 2] / tally.units, samples))


def _shares(cells: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the shares of yes of units by cell, (samples, cells) to (samples,)."""
    yes, votes = (units @ cells).T
    found: NDArray[np.float64] = yes / votes
    return found
