"""Trainings in float16 against torch.amp.GradScaler, on the same losses of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.adapters.attach import init_adapter
from tasks.core.progress import Progress
from tasks.engine import loss_scale as scaling
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.models.device import seed_everything
from tasks.train import trainer
from tasks.train.params import Method
from tasks.train.trainer import Training
from tests.helpers.rehearsal import rows_for, trained_by

FIRST = 2.0**30
"""So that the first steps overflow."""


@pytest.fixture(autouse=True)
def _in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPER_COMPUTE_DTYPE", "float16")
    monkeypatch.setattr(scaling, "FIRST", FIRST)


def prepared(base: Path, params: Method) -> Training:
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter)
    model.train()
    rows = rows_for(params.objective.name)
    return trainer.plan_training(model, rows, params, AdaptiveMicroBatch(params.micro_batch_size, fit=False), None)


def by_pytorch(training: Training) -> list[float]:
    """Trains with PyTorch's own scaler; returns the scale of each step."""
    scaler, scales, plan = torch.amp.GradScaler("cpu", init_scale=FIRST), [], training.plan
    (optimizer,) = training.optimizers
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.zero_grad()
        for part, _ in plan.losses(step):
            scaler.scale(part).backward()
        scales.append(scaler.get_scale())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(list(training.parameters.values()), plan.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
    return scales


def weights(training: Training) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in training.parameters.items()}


def trained(training: Training, folder: Path) -> list[dict[str, Any]]:
    return trainer.train(training, folder, Progress("t", training.plan.steps, "steps"))


@pytest.mark.parametrize(
    ("adapter", "objective"), [("lora", "sft"), ("lora", "orpo"), ("full", "sft"), ("loreft", "sft"), ("qlora", "sft")]
)
def test_weights_and_scales_are_those_of_pytorch_to_the_bit(
    pico_base: Path, tmp_path: Path, adapter: str, objective: str
) -> None:
    params = trained_by(adapter, objective, epochs=9)
    ours = prepared(pico_base, params)
    first, log = weights(ours), trained(ours, tmp_path / "ours")
    theirs = prepared(pico_base, params)  # which draws the same dropout
    scales = by_pytorch(theirs)
    assert [row["loss_scale"] for row in log] == scales
    taken = [row for row in log if not row["skipped"]]
    assert 0 < len(taken) < len(log)
    assert all(torch.equal(found, theirs.parameters[name]) for name, found in weights(ours).items())
    assert any(not torch.equal(found, first[name]) for name, found in weights(ours).items())
    first_taken = next(row["step"] for row in taken)
    for end in (first_taken, len(log)):  # after nothing but skipped steps, and just before the end
        folder = tmp_path / f"resumed{end}"
        again = prepared(pico_base, params)
        with pytest.raises(InterruptedError):
            trainer.train(again, folder, Progress("t", 1, "steps"), lambda row, end=end: stop_at(row, end))  # type: ignore[misc]
        again = prepared(pico_base, params)
        assert [row["loss_scale"] for row in trained(again, folder)] == scales
        assert all(torch.equal(found, weights(ours)[name]) for name, found in weights(again).items())


def stop_at(row: dict[str, Any], end: int) -> None:
    if row["step"] == end:
        raise InterruptedError


def test_without_a_scale_small_gradients_are_lost(pico_base: Path) -> None:
    """Of a loss that is a million times smaller: what the scale is there for."""
    training = prepared(pico_base, trained_by("lora", "sft"))
    for scale, lost in ((1.0, True), (2.0**16, False)):
        for parameter in training.parameters.values():
            parameter.grad = None
        for part, _ in training.plan.losses(0):
            (part * (scale * 1e-6)).backward()
        gradients = torch.cat([p.grad.flatten() for p in training.parameters.values() if p.grad is not None])
        assert (gradients.norm() / (scale * 1e-6) < 1e-3) == lost
