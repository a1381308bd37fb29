"""Loss scaling against torch.amp.GradScaler, which takes the same steps with the same optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.core.errors import BadData, Diverged
from tasks.core.progress import Progress
from tasks.engine import loss_scale as scaling
from tasks.engine.loop import TrainingPlan, train_loop
from tasks.engine.loss_scale import BACKOFF, FIRST, GROWTH, GROWTH_STEPS, LossScale

STEPS = 14
SLOPES = [0.4, 3.0, 0.4, 0.4, 0.3, 0.2, 0.4, 0.1, 0.2, 0.3, 0.4, 0.2, 1.2, 0.1]
"""Of the loss at each step, half of it in each part. float16 ends at 65,504: so 2^16 carries slopes below 2."""


class Killed(BaseException):
    """Stands for kill -9."""


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))


def part(learns: Tensor, slope: float) -> Tensor:
    """A loss whose gradient passes through float16, as large as the slope times the scale."""
    return (learns.half().float() * torch.tensor([slope, slope / 3, -slope / 7])).sum() + 5


def train(
    folder: Path, loss: Callable[[Tensor, int], Tensor] | None = None, *, die_after: int = 0, steps: int = STEPS
) -> tuple[Tensor, list[dict[str, Any]]]:
    learns = weight()

    def losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for _ in range(2):
            yield loss(learns, step) if loss else part(learns, SLOPES[step] / 2), {}

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == die_after:
            raise Killed

    plan = TrainingPlan(steps, lambda step: 0.01, losses, lambda step: [f"row {step}"], 0.2, 2)
    optimizer = torch.optim.AdamW([learns])
    progress = Progress("t", steps, "steps")
    log = train_loop(plan, {"w": learns}, [optimizer], folder, progress, on_row, scale=LossScale())
    return learns.detach(), log


def by_pytorch() -> tuple[Tensor, list[float], list[bool]]:
    """The weights at the end, the scale before each step, and whether it was skipped."""
    learns = weight()
    optimizer, scaler = torch.optim.AdamW([learns], lr=0.01), torch.amp.GradScaler("cpu", growth_interval=4)
    scales, skipped = [], []
    for slope in SLOPES:
        optimizer.zero_grad()
        before = learns.detach().clone()
        for _ in range(2):
            scaler.scale(part(learns, slope / 2)).backward()
        scales.append(scaler.get_scale())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([learns], 0.2)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(before, learns.detach()))
    return learns.detach(), scales, skipped


def test_constants_are_those_of_pytorch() -> None:
    scaler = torch.amp.GradScaler("cpu")
    theirs = (scaler._init_scale, scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
    assert theirs == (FIRST, GROWTH, BACKOFF, GROWTH_STEPS)


def test_steps_scales_and_weights_are_those_of_pytorch_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "GROWTH_STEPS", 4)
    found, log = train(tmp_path)
    expected, scales, skipped = by_pytorch()
    assert [row["loss_scale"] for row in log] == scales
    assert [bool(row["skipped"]) for row in log] == skipped
    assert torch.equal(found, expected)
    # by hand: 3.0 overflows at 2^16; after 4 finite steps at 2^15 it doubles, and again 4 later, where 1.2 overflows
    assert scales == [*[2.0**16] * 2, *[2.0**15] * 4, *[2.0**16] * 4, *[2.0**17] * 3, 2.0**16]
    assert [row["step"] for row in log if "grad_norm" not in row] == [2, 13]
    norm = SLOPES[0] * (1 + 1 / 9 + 1 / 49) ** 0.5
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)  # of the loss itself, before it is clipped
    assert log[1]["loss"] == pytest.approx(float(2 * part(train(tmp_path / "one", steps=1)[0], 1.5)), rel=1e-6)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_it_goes_on_with_the_same_scale(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "GROWTH_STEPS", 4)
    whole, whole_log = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", die_after=step)
    resumed, log = train(tmp_path / "killed")
    assert torch.equal(whole, resumed)
    assert log == whole_log


def test_a_checkpoint_without_a_scale_is_of_another_training(tmp_path: Path) -> None:
    learns = weight()
    plan = TrainingPlan(1, lambda step: 0.01, lambda step: [(part(learns, 0.1), {})], lambda step: [], 1.0, 1)
    log = train_loop(plan, {"w": learns}, [torch.optim.AdamW([learns])], tmp_path, Progress("t", 1, "steps"))
    assert log[0].keys() == {"step", "loss", "grad_norm", "learning_rate"}  # as ever, where nothing is scaled
    with pytest.raises(BadData, match="of another training"):
        train(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_it_at_once(tmp_path: Path, value: float) -> None:
    with pytest.raises(Diverged, match="TEMPER_COMPUTE_DTYPE=float32") as caught:
        train(tmp_path, lambda learns, step: part(learns, 0.1) * (value if step == 3 else 1.0))
    assert "step 4 of" in caught.value.where


def test_a_gradient_that_is_no_number_at_any_scale_ends_it(tmp_path: Path) -> None:
    """2^16 is halved sixteen times: the seventeenth step in a row is at scale 1, where nothing was scaled up."""
    with pytest.raises(Diverged, match="loss scale 1") as caught:
        train(tmp_path, lambda learns, step: (0 * learns).sqrt().sum() + part(learns, 0.1), steps=40)
    assert "step 17 of 40" in caught.value.where
