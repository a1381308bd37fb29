from __future__ import annotations

import math

import pytest

from flows.promote import Evidence, Score, figure, judge
from tasks.registry_params import Promote

EXACT = Promote(metric="exact_match", margin=0.0)
LOSS = Promote(metric="loss", margin=0.1)


def evidence(version: str, right: str, *, loss: float = 1.0, base: float = 0.2, base_loss: float = 2.0) -> Evidence:
    """A version that answered rows a, b, c, ... right (`1`) or wrong (`0`); `-` is a row that it never saw."""
    scores = {row: Score(mark == "1", loss, 1) for row, mark in zip("abcdefgh", right, strict=False) if mark != "-"}
    own = sum(s.correct for s in scores.values()) / len(scores)
    return Evidence(version, "m", {"exact_match": own, "loss": loss}, {"exact_match": base, "loss": base_loss}, scores)


def test_the_first_champion_must_beat_the_base() -> None:
    assert judge(evidence("1", "1100"), None, EXACT).passed
    assert not judge(evidence("1", "1100", base=0.5), None, EXACT).passed  # as good is not better
    assert judge(evidence("1", "1100"), None, LOSS).passed
    assert not judge(evidence("1", "1100", loss=2.5), None, LOSS).passed


def test_a_challenger_must_not_be_worse_than_the_champion() -> None:
    champion = evidence("1", "1110")
    assert judge(evidence("2", "1111"), champion, EXACT).passed
    assert judge(evidence("2", "0111"), champion, EXACT).passed
    assert not judge(evidence("2", "0011"), champion, EXACT).passed
    assert judge(evidence("2", "0011"), champion, Promote(metric="exact_match", margin=0.25)).passed


def test_they_are_compared_on_the_rows_that_both_answered() -> None:
    champion = evidence("1", "1100----")
    assert judge(evidence("2", "--001111"), champion, EXACT).passed  # 0 of 2 against 0 of 2 on c and d
    verdict = judge(evidence("2", "-0001111"), champion, EXACT)
    assert not verdict.passed  # 0 of 3 against 1 of 3 on b, c and d, whatever the new rows say
    assert "on 3 common rows" in verdict.findings[1]


def test_without_a_common_row_there_is_no_evidence() -> None:
    verdict = judge(evidence("2", "----1111"), evidence("1", "1111----"), EXACT)
    assert not verdict.passed
    assert "0 common rows" in verdict.findings[1]


@pytest.mark.parametrize("missing", ["own", "base"])
def test_a_missing_figure_fails(missing: str) -> None:
    challenger = evidence("2", "1111")
    values: list[dict[str, float]] = [{}, {"exact_match": math.nan}]
    for value in values:
        changed = challenger._replace(own=value) if missing == "own" else challenger._replace(base=value)
        assert not judge(changed, None, EXACT).passed


def test_the_loss_may_be_higher_by_the_margin() -> None:
    champion = evidence("1", "11", loss=1.0)
    assert judge(evidence("2", "11", loss=1.09), champion, LOSS).passed
    assert not judge(evidence("2", "11", loss=1.11), champion, LOSS).passed


def test_figures_by_hand() -> None:
    scores = {"a": Score(True, 1.0, 1), "b": Score(False, 4.0, 3)}
    assert figure(scores, ["a", "b"], "exact_match") == 0.5
    assert figure(scores, ["a", "b"], "loss") == pytest.approx(13 / 4)
    assert math.isnan(figure(scores, [], "loss"))
