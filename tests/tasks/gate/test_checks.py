"""The gate, against scipy's resampling, against exact counts of small cases, and shut on everything that is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tasks.gate.checks import VersionRecord, decide
from tasks.gate.params import Promote
from tasks.reports.items import HELD_OUT, Item, Items, by_suite, compare_items, prompt_digest

MAX_KL = 0.01


def params(**changes: Any) -> Promote:
    values: dict[str, Any] = {
        "suite": HELD_OUT,
        "metric": "score",
        "margin": 0.0,
        "confidence": 0.95,
        "bootstrap_samples": 4000,
        "seed": 1,
        "max_noise": 0.2,
        "floors": {},
        "guarded": {},
        "max_contamination": 0.0,
        "approval": "none",
        "approval_timeout_s": 60,
    }
    return Promote.model_validate({**values, **changes})


def item(number: int, score: float, suite: str = HELD_OUT, logp: float = -1.0, tokens: int = 1) -> Item:
    prompt = f"question {number}"
    return Item(suite, "t", str(number), prompt, prompt_digest(prompt), "x", "y", score, logp, tokens)


def results(scores: Sequence[float], suite: str = HELD_OUT, first: int = 0) -> list[Item]:
    return [item(number, score, suite) for number, score in enumerate(scores, first)]


def evidence(version: str, items: Sequence[Item], base: Sequence[Item], **changes: Any) -> VersionRecord:
    templates = dict.fromkeys(("training", "evaluation", "model"), "a" * 64)
    found = VersionRecord(version, "m", by_suite(items), by_suite(base), templates, 1e-4, {HELD_OUT: 0.0}, "")
    return found._replace(**changes)


def shares(right: int, of: int = 200, seed: int = 0) -> list[float]:
    """So many right answers among all, in random places."""
    marks = [1.0] * right + [0.0] * (of - right)
    Random(seed).shuffle(marks)
    return marks


GOOD = evidence("2", results(shares(180)), results(shares(20, seed=9)))


def failed(version: VersionRecord, champion: VersionRecord | None = None, **changes: Any) -> list[str]:
    verdict = decide(version, champion, params(**changes), MAX_KL)
    assert verdict.passed == all(finding.passed for finding in verdict.findings)
    return [finding.check for finding in verdict.findings if not finding.passed]


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_paired_bootstrap() -> None:
    random = np.random.default_rng(5)
    old, new = random.random(120), random.random(120) + 0.1
    found = compare_items(by(new), by(old), "score", params().resampling)
    theirs = scipy.stats.bootstrap(
        (new, old),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert found.gain == pytest.approx((new - old).mean())
    assert (found.new, found.old) == pytest.approx((new.mean(), old.mean()))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def by(scores: Sequence[float] | np.ndarray[Any, Any]) -> Items:
    return by_suite(results([float(score) for score in scores]))[HELD_OUT]


def test_the_noise_floor_is_the_quantile_of_all_swaps() -> None:
    """Six items: all 64 ways to swap results are counted out."""
    new, old = [1.0, 1.0, 0.0, 1.0, 0.5, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.5]
    gains = np.subtract(new, old)
    swaps = sorted(abs(float(np.dot(gains, signs)) / 6) for signs in product((1, -1), repeat=6))
    found = compare_items(by(new), by(old), "score", params().resampling)
    assert found.noise == pytest.approx(swaps[math.ceil(0.95 * 63)])


def test_a_difference_counts_as_a_permutation_test_of_scipy_says() -> None:
    for right, counts in ((140, False), (150, False), (175, True)):
        new, old = shares(right, seed=1), shares(140, seed=2)
        found = compare_items(by(new), by(old), "score", params().resampling)
        theirs = scipy.stats.permutation_test(
            (new, old),
            lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=4000,
            rng=np.random.default_rng(1),
        )
        assert (found.counted > 0) == counts
        assert (theirs.pvalue < 0.05) == counts


def test_the_loss_is_of_all_tokens_and_lower_is_better() -> None:
    new = by_suite([item(0, 0, logp=-1.0, tokens=1), item(1, 0, logp=-6.0, tokens=3)])[HELD_OUT]
    old = by_suite([item(0, 0, logp=-2.0, tokens=1), item(1, 0, logp=-10.0, tokens=3)])[HELD_OUT]
    found = compare_items(new, old, "loss", params().resampling)
    assert (found.new, found.old, found.gain) == pytest.approx((7 / 4, 12 / 4, 5 / 4))
    assert found.low >= 0.999  # item 0 alone gains 1, item 1 alone 4/3


def test_equal_models_differ_by_nothing_and_the_same_seed_tells_the_same() -> None:
    same = compare_items(by(shares(90)), by(shares(90)), "score", params().resampling)
    assert (same.gain, same.low, same.high, same.noise, same.counted) == (0.0,) * 5
    new, old = by(shares(100, seed=3)), by(shares(90))
    assert compare_items(new, old, "score", params().resampling) == compare_items(
        new, old, "score", params().resampling
    )
    assert compare_items(new, old, "score", params().resampling) != compare_items(
        new, old, "score", params(seed=2).resampling
    )


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_two_items_prove_nothing(gain: float) -> None:
    """The bootstrap alone would be sure: both items say the same."""
    new, old = ([1.0, 1.0], [0.0, 0.0]) if gain > 0 else ([0.0, 0.0], [1.0, 1.0])
    found = compare_items(by(new), by(old), "score", params().resampling)
    assert found.low == found.high == gain
    assert found.counted == 0.0


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_the_first_champion_must_be_better_than_the_base() -> None:
    assert failed(GOOD) == []
    same = evidence("2", results(shares(20)), results(shares(20)))
    assert failed(same) == ["against base"]
    by_chance = evidence("2", results([*shares(20)[:-1], 1.0]), results([*shares(20)[:-1], 0.0]))
    assert failed(by_chance) == ["against base"]  # one answer more is no gain that counts


def test_a_challenger_must_not_be_worse_than_the_champion() -> None:
    champion = evidence("1", results(shares(180, seed=4)), results(shares(20, seed=9)))
    assert failed(GOOD, champion) == []  # as good
    worse = evidence("3", results(shares(140, seed=5)), results(shares(20, seed=9)))
    assert failed(worse, champion) == ["against champion"]
    assert failed(worse, champion, margin=0.25) == []
    assert failed(worse, champion, margin=0.15) == ["against champion"]
    slightly = evidence("3", results([0.0, *shares(180, seed=4)[1:]]), results(shares(20, seed=9)))
    assert failed(slightly, champion) == []  # a loss within the noise does not count


def test_where_noise_hides_every_loss_the_gate_stays_shut() -> None:
    champion = evidence("1", results([1.0] * 4), results([0.0] * 4))
    challenger = evidence("2", results([1.0, 0.0, 0.0, 0.0]), results([0.0] * 4))
    assert "against champion" in failed(challenger, champion)
    found = decide(challenger, champion, params(), MAX_KL).findings[-1].difference
    assert found is not None
    assert found.counted == 0.0
    assert found.noise == 0.75


def test_a_large_gain_is_not_hidden_by_the_noise_that_it_makes() -> None:
    champion = evidence("1", results([0.0] * 100), results([0.0] * 100))
    challenger = evidence("2", results([1.0] * 100), results([0.0] * 100))
    found = decide(challenger, champion, params(max_noise=0.01), MAX_KL).findings[-1].difference
    assert found is not None
    assert found.noise > 0.1  # results that differ on every item swap far
    assert failed(challenger, champion, max_noise=0.01) == []


def test_they_are_compared_on_the_items_that_both_answered() -> None:
    champion = evidence("1", results([1.0] * 100), results([0.0] * 100))
    base = results([0.0] * 200, first=100)
    challenger = evidence("2", results([1.0] * 200, first=100), base)
    verdict = decide(challenger, champion, params(), MAX_KL)
    (against,) = [finding for finding in verdict.findings if finding.check == "against champion"]
    assert not against.passed
    assert against.said == "no items in common with champion 1"
    other_target = [each._replace(target="z") for each in results([1.0] * 100)]
    assert failed(evidence("2", other_target, results([0.0] * 100)), champion) == ["against base", "against champion"]


def test_guarded_suites_may_not_lose_more_than_their_margin() -> None:
    def version(number: str, right: int, seed: int) -> VersionRecord:
        items = [*results(shares(180)), *results(shares(right, seed=seed), "exam")]
        base = [*results(shares(20, seed=9)), *results(shares(100, seed=8), "exam")]
        return evidence(number, items, base, contamination={HELD_OUT: 0.0, "exam": 0.0})

    champion, challenger = version("1", 150, 1), version("2", 110, 2)
    assert failed(challenger, champion) == []  # nobody guards it
    assert failed(challenger, champion, guarded={"exam": 0.05}) == ["guarded"]
    assert failed(challenger, champion, guarded={"exam": 0.3}) == []
    assert failed(challenger, None, guarded={"exam": 0.05}) == []  # the base is no better
    assert failed(version("2", 40, 3), None, guarded={"exam": 0.05}) == ["guarded"]
    assert failed(challenger, champion, guarded={"unheard of": 0.05}) == ["contamination", "guarded"]


def test_floors() -> None:
    assert failed(GOOD, floors={HELD_OUT: 0.9}) == []
    assert failed(GOOD, floors={HELD_OUT: 0.91}) == ["floor"]
    assert failed(GOOD, floors={"unheard of": 0.0}) == ["contamination", "floor"]


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        ({"mean_kl": math.nan}, "merge", "missing, at most 0.01"),
        ({"mean_kl": 0.02}, "merge", "mean KL 0.02, at most 0.01"),
        ({"templates": {}}, "template", "training, evaluation, model: missing, missing, missing"),
        ({"templates": {"training": "a", "evaluation": "a", "model": "b"}}, "template", "a, a, b"),
        ({"contamination": {}}, "contamination", "not looked for"),
        ({"contamination": {HELD_OUT: math.nan}}, "contamination", "not looked for"),
        ({"contamination": {HELD_OUT: 0.01}}, "contamination", "1.00% of its items stand in the training rows"),
        ({"broken": "model.safetensors was changed"}, "files", "was changed"),
        ({"base": {}}, "against base", "no items in common with base"),
        ({"suites": {}}, "against base", "no items in common with base"),
    ],
)
def test_what_is_missing_or_wrong_shuts_the_gate(changes: dict[str, Any], check: str, said: str) -> None:
    verdict = decide(GOOD._replace(**changes), None, params(), MAX_KL)
    assert not verdict.passed
    (finding,) = [finding for finding in verdict.findings if not finding.passed]
    assert finding.check == check
    assert said in finding.said


@pytest.mark.parametrize("metric", ["score", "loss"])
def test_one_figure_that_is_no_number_shuts_the_gate(metric: str) -> None:
    """Row 75."""
    items = results(shares(180))
    items[7] = items[7]._replace(score=math.nan, logp=math.nan)
    verdict = decide(GOOD._replace(suites=by_suite(items)), None, params(metric=metric, floors={HELD_OUT: 0.1}), MAX_KL)
    told = {finding.check: finding.said for finding in verdict.findings if not finding.passed}
    assert told["against base"] == f"{metric} is absent of some of 200 items; the gate fails closed"
    assert told["floor"] == "score is absent, at least 0.1"


def test_a_verdict_is_json_and_its_digest_is_of_all_of_it() -> None:
    verdict = decide(GOOD._replace(base={}), None, params(), MAX_KL)
    told = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    (found,) = [finding["difference"] for finding in told["findings"] if finding["check"] == "against base"]
    assert found["items"] == 0
    assert found["gain"] is None
    assert verdict.digest() == decide(GOOD._replace(base={}), None, params(), MAX_KL).digest()
    assert verdict.digest() != decide(GOOD, None, params(), MAX_KL).digest()
    assert verdict.summary() == "4 of 5 checks passed; no items in common with base"
