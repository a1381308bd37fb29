"""What people said of live answers, at the gate: refused, passed, or not asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.gate.checks import GateDecision, decide
from tasks.gate.live import LiveEvidence, LiveFigures
from tasks.gate.params import Live
from tasks.gate.tallies import Tally, share_difference, tally_of
from tests.tasks.gate.test_checks import GOOD, MAX_KL, params

CHAMPION = GOOD._replace(version="1")


def single(yes: int, of: int) -> Tally:
    return tally_of({"1/1": yes, "0/1": of - yes})


def evidence(new: tuple[int, int], old: tuple[int, int], **fields: Any) -> LiveEvidence:
    """So many of so many thumbs up, of the version and of the champion."""
    found = LiveEvidence("said.db", "2026-11-01T00:00:00+00:00", "2026-11-30T00:00:00+00:00")
    figures = (LiveFigures(answers=each[1], thumbs=single(*each)) for each in (new, old))
    version, champion = figures
    return found._replace(version=version, champion=champion, **fields)


def verdict(live: LiveEvidence | None, **asked: Any) -> GateDecision:
    return decide(GOOD, CHAMPION, params(live=Live.model_validate(asked)), MAX_KL, live)


def failed(live: LiveEvidence | None, **asked: Any) -> list[str]:
    return [finding.check for finding in verdict(live, **asked).findings if not finding.passed]


def test_nothing_is_asked_for_unless_params_say_so() -> None:
    found = verdict(evidence((0, 500), (500, 500)))
    assert found.passed
    assert not [finding for finding in found.findings if finding.check.startswith("live")]


@pytest.mark.parametrize("use", ["taken", "demanded"])
def test_a_version_that_people_like_clearly_less_is_refused(use: str) -> None:
    """0.5 of 100 beside 0.75 of 400: by a chi-squared test p is below 0.00001."""
    asked = {"thumbs": {"use": use}}
    assert failed(evidence((50, 100), (300, 400)), **asked) == ["live thumbs"]
    assert failed(evidence((75, 100), (300, 400)), **asked) == []
    assert failed(evidence((90, 100), (300, 400)), **asked) == []
    assert failed(evidence((50, 100), (300, 400)), thumbs={"use": use, "margin": 0.3}) == []


def test_too_few_people_hold_back_only_what_is_demanded_of_them() -> None:
    few = evidence((5, 30), (300, 400))
    for live, said in ((few, "fewer than 50 users"), (None, "no record")):
        for use, refused in (("taken", []), ("demanded", ["live thumbs"])):
            found = verdict(live, thumbs={"use": use})
            assert [finding.check for finding in found.findings if not finding.passed] == refused
            (thumbs,) = [finding.said for finding in found.findings if finding.check == "live thumbs"]
            assert said in thumbs
    assert failed(few, thumbs={"use": "taken"}, least=30) == ["live thumbs"]


def test_where_noise_would_hide_a_loss_a_demanded_check_fails() -> None:
    """60 beside 60: a difference of 0.18 is chance."""
    same = evidence((30, 60), (31, 60))
    assert failed(same, thumbs={"use": "taken"}, max_noise=0.1) == []
    assert failed(same, thumbs={"use": "demanded"}, max_noise=0.1) == ["live thumbs"]
    assert failed(same, thumbs={"use": "demanded"}, max_noise=0.2) == []


@pytest.mark.parametrize(("wins", "passes"), [(30, False), (45, True), (80, True)])
def test_a_version_that_loses_of_two_is_refused(wins: int, passes: bool) -> None:
    live = evidence((1, 2), (1, 2), preferences=single(wins, 100))
    assert (failed(live, preferences={"use": "taken"}) == []) == passes


def test_cut_and_empty_answers_are_held_against_a_version() -> None:
    live = evidence((1, 2), (1, 2))
    live = live._replace(
        version=live.version._replace(complete=single(60, 100)),
        champion=live.champion._replace(complete=single(195, 200)),
    )
    assert failed(live, complete={"use": "taken"}) == ["live complete"]


def test_a_shadow_must_agree_as_often_as_is_asked() -> None:
    live = evidence((1, 2), (1, 2), agreement=single(80, 100))
    assert failed(live, min_agreement=0.7) == []
    assert failed(live, min_agreement=0.9) == ["live agreement"]
    assert failed(live._replace(agreement=single(9, 9 + 1)), min_agreement=0.7) == ["live agreement"]


def test_the_first_champion_has_nobody_beside_it() -> None:
    asked = params(live=Live.model_validate({"thumbs": {"use": "demanded"}}))
    assert decide(GOOD, None, asked, MAX_KL).passed


def test_a_verdict_has_the_numbers_that_it_can_be_computed_again_from() -> None:
    asked = {"thumbs": {"use": "taken"}}
    found = verdict(evidence((50, 100), (300, 400)), **asked)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    live = told["live"]
    assert (live["source"], live["since"]) == ("said.db", "2026-11-01T00:00:00+00:00")
    new, old = (tally_of(live[who]["thumbs"]) for who in ("version", "champion"))
    (thumbs,) = [each["difference"] for each in told["findings"] if each["check"] == "live thumbs"]
    assert share_difference(new, old, params().resampling)._asdict() == thumbs
    assert "up 0.500 [0.404, 0.596] of 100 by 100, champion 1 0.750" in found.summary()
    assert "said.db since 2026-11-01" in found.summary()
    assert found.digest() != verdict(evidence((50, 100), (301, 400)), **asked).digest()


def test_without_a_record_the_verdict_is_json() -> None:
    found = verdict(None, thumbs={"use": "taken"}, preferences={"use": "taken"})
    assert found.passed
    json.dumps(found.as_dict(), allow_nan=False)
