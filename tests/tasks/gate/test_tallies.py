"""Shares of votes that stand together, against scipy: closed forms of independent votes, resampling elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tasks.gate.tallies import Tally, preference, share_difference, tallied, tally_of, wilson
from tasks.reports.statistics import Resampling

OFTEN = Resampling(20_000, 1, 0.95)


def single(yes: int, of: int) -> Tally:
    """One vote of each unit."""
    return tally_of({"1/1": yes, "0/1": of - yes} if 0 < yes < of else {f"{int(yes > 0)}/1": of})


UNEVEN = tally_of({"0/1": 20, "1/1": 25, "4/5": 6, "1/8": 5, "9/9": 3})


def test_votes_are_counted_by_their_unit() -> None:
    found = tallied([("a", True), ("b", False), ("a", True), ("c", False), ("a", False), ("d", False)])
    assert found.as_dict() == {"0/1": 3, "2/3": 1}
    assert (found.yes, found.votes, found.units, found.share) == (2, 6, 4, 2 / 6)
    assert tally_of(found.as_dict()) == found
    assert math.isnan(tallied([]).share)


@pytest.mark.parametrize(("yes", "of"), [(7, 10), (70, 100), (0, 12), (12, 12), (1, 400)])
def test_the_interval_of_independent_votes_is_wilsons(yes: int, of: int) -> None:
    theirs = scipy.stats.binomtest(yes, of).proportion_ci(0.95, method="wilson")
    assert wilson(single(yes, of), 0.95) == pytest.approx((yes / of, theirs.low, theirs.high))


def test_votes_that_repeat_another_of_their_unit_add_nothing() -> None:
    once, five_times = tally_of({"0/1": 30, "1/1": 70}), tally_of({"0/5": 30, "5/5": 70})
    assert wilson(five_times, 0.95) == pytest.approx(wilson(once, 0.95))
    assert wilson(tally_of({"5/5": 12}), 0.95) == pytest.approx(wilson(single(12, 12), 0.95))
    assert all(math.isnan(each) for each in wilson(Tally(), 0.95))


def ratio(tally: Tally) -> Any:
    """The units of a tally one by one, and the share of those that are drawn, for scipy."""
    rows = np.repeat([cell[:2] for cell in tally.cells], [cell[2] for cell in tally.cells], axis=0)
    return np.arange(len(rows)), lambda drawn, axis: rows[drawn, 0].sum(axis) / rows[drawn, 1].sum(axis)


def test_the_interval_of_a_difference_is_scipys_bootstrap_over_units() -> None:
    other = tally_of({"0/1": 40, "1/1": 80, "2/6": 7})
    (new, new_share), (old, old_share) = ratio(UNEVEN), ratio(other)
    found = share_difference(UNEVEN, other, OFTEN)
    theirs = scipy.stats.bootstrap(
        (new, old),
        lambda one, two, axis: new_share(one, axis) - old_share(two, axis),
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (found.new, found.old, found.gain) == pytest.approx((UNEVEN.share, other.share, UNEVEN.share - other.share))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert found.items == 59 + 127


def test_the_noise_of_a_difference_is_the_quantile_of_the_hypergeometric() -> None:
    """One vote a unit: shuffled, the first group's yes are so distributed, and the second's are the rest."""
    found = share_difference(single(14, 20), single(90, 180), OFTEN)
    yes = np.arange(21)
    sizes = np.abs(yes / 20 - (104 - yes) / 180)
    chances = scipy.stats.hypergeom.pmf(yes, 200, 104, 20)
    order = np.argsort(sizes)
    exact = sizes[order][np.searchsorted(np.cumsum(chances[order]), 0.95)]
    assert found.noise == pytest.approx(exact)


@pytest.mark.parametrize(("wins", "of"), [(52, 100), (58, 100), (64, 100), (20, 60)])
def test_a_preference_counts_as_the_sign_test_says(wins: int, of: int) -> None:
    found = preference(single(wins, of), OFTEN)
    assert found.gain == pytest.approx((2 * wins - of) / of)
    assert (found.counted != 0) == (scipy.stats.binomtest(wins, of).pvalue < 0.05)


def test_a_hundred_votes_of_one_are_not_those_of_a_hundred() -> None:
    alone = tally_of({"100/100": 1, "0/1": 5, "1/1": 5})
    assert preference(alone, OFTEN).counted == 0
    assert preference(single(105, 110), OFTEN).counted > 0.8
    assert share_difference(alone, single(50, 100), OFTEN).counted == 0


def test_equal_versions_are_refused_as_seldom_as_the_confidence_says_and_worse_ones_mostly_are() -> None:
    """Users with several votes each, that resemble each other: a beta-binomial, drawn two hundred times."""
    random, few = np.random.default_rng(0), Resampling(400, 1, 0.95)

    def group(users: int, liked: float) -> Tally:
        votes = random.geometric(0.3, users)
        yes = random.binomial(votes, random.beta(2 * liked, 2 * (1 - liked), users))
        return tallied((str(user), n < yes[user]) for user in range(users) for n in range(votes[user]))

    refused = {
        liked: sum(share_difference(group(60, liked), group(600, 0.8), few).counted < 0 for _ in range(200)) / 200
        for liked in (0.8, 0.5)
    }
    assert refused[0.8] < 0.05
    assert refused[0.5] > 0.9


def test_nothing_is_said_of_nothing() -> None:
    for found in (preference(Tally(), OFTEN), share_difference(Tally(), UNEVEN, OFTEN)):
        assert math.isnan(found.counted)


def test_the_same_seed_tells_the_same() -> None:
    few = Resampling(200, 1, 0.95)
    assert share_difference(UNEVEN, single(50, 100), few) == share_difference(UNEVEN, single(50, 100), few)
    assert share_difference(UNEVEN, single(50, 100), few) != share_difference(
        UNEVEN, single(50, 100), few._replace(seed=2)
    )
