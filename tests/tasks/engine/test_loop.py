from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.core.errors import Diverged, Interrupted
from tasks.core.progress import Progress
from tasks.engine.loop import TrainingPlan, train_loop

STEPS = 9


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def train(
    folder: Path, *, die_after: int = 0, harm: dict[int, float] | None = None
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A little regression with dropout, so that the random state matters; two optimizers, as pretraining has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    inputs, targets = torch.randn(STEPS, 16, 4), torch.randn(STEPS, 16, 1)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizers = [
        torch.optim.AdamW(first, lr=0.01),
        torch.optim.Muon([second[0]], lr=0.01),
        torch.optim.SGD([second[1]], lr=0.01),
    ]

    def losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for half in (slice(0, 8), slice(8, 16)):
            value = (model(inputs[step, half]) - targets[step, half]).square().mean() / 2
            yield value * (harm or {}).get(step, 1.0), {"twice": torch.tensor(1.0)}

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == die_after:
            raise Killed

    course = TrainingPlan(
        steps=STEPS,
        learning_rate=lambda step: 0.01 * (step + 1),
        losses=losses,
        describe=lambda step: [f"row {step}"],
        max_grad_norm=1.0,
        checkpoint_every_steps=2,
    )
    log = train_loop(course, dict(model.named_parameters()), optimizers, folder, Progress("t", STEPS, "steps"), on_row)
    return model, log


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_and_run_again_it_gives_the_same_bits(tmp_path: Path, step: int) -> None:
    whole, whole_log = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", die_after=step)
    resumed, log = train(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert log == whole_log
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = train(tmp_path)
    again, log = train(tmp_path, die_after=1)  # would be killed if it took a step
    assert len(log) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 6, STEPS - 1])
def test_the_first_loss_that_is_not_finite_ends_it(tmp_path: Path, step: int, value: float) -> None:
    with pytest.raises(Diverged) as caught:
        train(tmp_path, harm={step: value})
    assert caught.value.exit_code == 65
    assert f"step {step + 1} of {STEPS}" in caught.value.where
    assert caught.value.examples == (f"row {step}",)
    resumed, _ = train(tmp_path)  # what was saved before is good
    whole, _ = train(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "whole")
    before = signal.getsignal(number)
    import tasks.engine.checkpoints

    real = tasks.engine.checkpoints.save

    def save_and_signal(folder: Path, checkpoint: Any) -> None:
        real(folder, checkpoint)
        if checkpoint.step == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(tasks.engine.loop, "save", save_and_signal)
    with pytest.raises(Interrupted) as caught:
        train(tmp_path / "stopped")
    monkeypatch.undo()
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before
    newest = max((tmp_path / "stopped").glob("step-*")).name
    assert newest in ("step-00000004", "step-00000005")
    resumed, _ = train(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
