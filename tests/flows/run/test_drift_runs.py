"""Runs that a drift makes due with fewer new rows than are waited for else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from flows.run.data_page import NUMBERS
from flows.run.feedback_runs import DriftWatch, Listener
from flows.serve.drift import DAYS, EVERY_S
from tasks.core.errors import BadParams
from tests.conftest import temper
from tests.flows.run.test_feedback_runs import add_source, vote
from tests.flows.serve.test_drift import LONG, SHORT, asked, recorded, trained


@pytest.fixture
def made(workspace: Path) -> Callable[[Iterable[str]], Path]:
    """A workspace that trained on short questions, and recorded others."""

    def make(texts: Iterable[str]) -> Path:
        (workspace / NUMBERS).parent.mkdir(parents=True, exist_ok=True)
        (workspace / NUMBERS).write_text(json.dumps({"sources": {}, **trained(SHORT * 5)}))
        recorded(workspace / "said.db", [asked(f"{n}-{text}", text) for text in texts for n in range(4)])
        add_source(workspace)
        return workspace

    return make


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_where_something_drifted_one_new_row_is_enough(made: Callable[[Iterable[str]], Path]) -> None:
    workspace, clock = made(LONG), Clock()
    listener = Listener(workspace, 100, DriftWatch(workspace, 0.25, clock))
    assert listener.due() is None  # there is nothing that is new to train on
    vote(workspace, range(1))
    assert Listener(workspace, 100).due() is None
    assert Listener(workspace, 100, DriftWatch(workspace, 1000.0)).due() is None
    assert listener.due() == 1
    listener.made()
    vote(workspace, range(1, 3))
    clock.now = DAYS * 86_400 - 1
    assert listener.due() is None  # a run was made of it
    clock.now = DAYS * 86_400
    assert listener.due() == 3


def test_where_nothing_drifted_rows_are_waited_for(made: Callable[[Iterable[str]], Path]) -> None:
    workspace = made(SHORT)
    vote(workspace, range(1))
    assert Listener(workspace, 2, DriftWatch(workspace, 0.25)).due() is None
    vote(workspace, range(1, 2))
    assert Listener(workspace, 2, DriftWatch(workspace, 0.25)).due() == 2


def test_a_record_is_looked_at_every_half_hour(made: Callable[[Iterable[str]], Path]) -> None:
    workspace, clock = made(SHORT[:1]), Clock()
    watch = DriftWatch(workspace, 0.25, clock)
    assert watch.reasons() == ()
    recorded(workspace / "said.db", [asked(f"{n}-{text}", text) for text in LONG for n in range(4)])
    clock.now = EVERY_S - 1
    assert watch.reasons() == ()
    clock.now = EVERY_S
    assert [each.partition(":")[0] for each in watch.reasons()] == ["prompt characters", "prompt words"]
    (workspace / NUMBERS).unlink()
    clock.now = 2 * EVERY_S
    with pytest.raises(BadParams, match="has no profile of the prompts"):
        watch.reasons()


def test_a_limit_of_drift_goes_with_a_number_of_rows(workspace: Path) -> None:
    assert "goes with --on-feedback" in temper(workspace, "schedule", "--every=1d", "--on-drift=0.25", code=65).stderr
