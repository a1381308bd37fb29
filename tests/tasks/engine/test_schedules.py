"""Learning rates, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tasks.engine.params import Schedule, WarmupStableDecay
from tasks.engine.schedules import learning_rates


def rates(schedule: Schedule, **changes: Any) -> list[float]:
    chosen = {"peak": 1.0, "warmup_steps": 2, "steps": 10, **changes}
    rate = learning_rates(schedule, **chosen)
    return [rate(step) for step in range(chosen["steps"])]


def test_the_warm_up_reaches_the_peak_at_its_last_step_whatever_follows() -> None:
    for schedule in ("constant", "linear", "cosine", WarmupStableDecay()):
        assert rates(schedule, peak=3.0)[:3] == [1.5, 3.0, 3.0]
        assert rates(schedule, warmup_steps=0)[0] == 1.0
        assert rates(schedule, warmup_steps=20) == pytest.approx([0.05 * n for n in range(1, 11)])


def test_constant_linear_and_cosine() -> None:
    assert rates("constant")[2:] == [1.0] * 8
    assert rates("linear")[2:] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rates("cosine")[6] == pytest.approx(0.5)
    assert rates("cosine")[4] == pytest.approx(0.5 + 0.5 * 2**-0.5)
    assert rates("cosine")[9] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 7 / 8))


def test_warm_up_stable_decay() -> None:
    """Ten steps, two of warm-up, the last four going down by 1 - sqrt(n / 4)."""
    half = 1 - math.sqrt(0.5)
    expected = [1, 2, 2, 2, 2, 2, 2, 1.0, 2 * half, 2 * (1 - math.sqrt(0.75))]
    assert rates(WarmupStableDecay(wsd=0.4), peak=2.0) == pytest.approx(expected)
    whole = rates(WarmupStableDecay(wsd=1.0), steps=4)
    assert whole == pytest.approx([0.5, 1, 1, half])  # the decay begins where the warm-up ends
