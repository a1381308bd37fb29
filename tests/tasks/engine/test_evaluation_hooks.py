"""When a training stops early and what it keeps, on a toy whose held-out losses are given by hand."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.core.errors import BadData, BadInput, Diverged
from tasks.core.progress import Progress
from tasks.engine.evaluation_hooks import EvalHook, EvalHooks
from tasks.engine.loop import TrainingPlan, train_loop
from tasks.reports.training_log import HELD_OUT_LOSS, SAMPLES, best_step, evals_since_best, numbers_of

STEPS = 12
DOWN_THEN_UP = [5.0, 3.0, 4.0, 3.0, 3.5, 9.0]
"""Held-out losses after steps 2, 4, ..., 12: the best is that of step 4; step 8 is as good, which is no better."""


class Killed(BaseException):
    """Stands for kill -9."""


def rows(losses: list[float], every: int = 2) -> list[dict[str, Any]]:
    return [
        {"step": step, **({HELD_OUT_LOSS: losses[step // every - 1]} if step % every == 0 else {})}
        for step in range(1, len(losses) * every + 1)
    ]


def test_the_best_step_is_the_first_of_the_lowest() -> None:
    assert best_step([{"step": 1}]) is None
    assert best_step(rows(DOWN_THEN_UP)) == 4
    assert [evals_since_best(rows(DOWN_THEN_UP[:n])) for n in range(7)] == [0, 0, 0, 1, 2, 3, 4]


def test_patience_counts_looks_that_are_no_better() -> None:
    assert [EvalHooks(patience=2).is_over(rows(DOWN_THEN_UP[:n])) for n in range(1, 6)] == [False] * 3 + [True, True]
    assert not EvalHooks().is_over(rows(DOWN_THEN_UP))
    assert EvalHooks(keep_best=True).kept_step(rows(DOWN_THEN_UP)) == 4
    assert EvalHooks().kept_step(rows(DOWN_THEN_UP)) == 12


def test_looks_come_every_so_many_steps_and_after_the_last() -> None:
    watch = EvalHooks([EvalHook("a", 3, lambda: 1), EvalHook("b", 5, lambda: 2)])
    seen = [sorted(watch.look(step, 7)) for step in range(1, 8)]
    assert seen == [[], [], ["a"], [], ["b"], ["a"], ["a", "b"]]


def test_only_numbers_of_a_row_are_numbers() -> None:
    assert numbers_of({"step": 3, "loss": 1.0, SAMPLES: [{"prompt": "a"}]}) == {"loss": 1.0}


def train(
    folder: Path, *, patience: int | None, keep_best: bool, die_after: int = 0, averaging: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """A toy with dropout; returns its weights, its log and the weights that each look saw."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    inputs, targets = torch.randn(STEPS, 16, 4), torch.randn(STEPS, 16, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    if averaging:
        optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters())
    seen: dict[int, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())

    def losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        yield (model(inputs[step]) - targets[step]).square().mean(), {}

    def held_out() -> float:
        seen[len(logged) + 1] = {name: p.detach().clone() for name, p in parameters.items()}
        return DOWN_THEN_UP[(len(logged) + 1) // 2 - 1]

    logged: list[int] = []

    def on_row(row: dict[str, Any]) -> None:
        logged.append(row["step"])
        if row["step"] == die_after:
            raise Killed

    course = TrainingPlan(STEPS, lambda step: 0.01, losses, lambda step: [], 1.0, 3)
    watch = EvalHooks([EvalHook(HELD_OUT_LOSS, 2, held_out)], patience, keep_best)
    if (kept := max(folder.glob("step-*"), default=None)) is not None:
        logged += range(1, int(kept.name[5:]) + 1)
    log = train_loop(course, parameters, [optimizer], folder, Progress("t", STEPS, "steps"), on_row, watch)
    return {name: p.detach().clone() for name, p in parameters.items()}, log, seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("patience", "steps"), [(None, 12), (1, 6), (2, 8), (3, 10), (4, 12)])
def test_it_stops_by_its_rule_and_keeps_the_best(tmp_path: Path, patience: int | None, steps: int) -> None:
    weights, log, seen = train(tmp_path / "best", patience=patience, keep_best=True)
    assert len(log) == steps
    assert same(weights, seen[4])
    last, log, seen = train(tmp_path / "last", patience=patience, keep_best=False)
    assert len(log) == steps
    assert same(last, seen[steps])
    assert not same(last, weights)


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("die_after", range(1, 11))
def test_killed_anywhere_it_stops_at_the_same_step_and_keeps_the_same_bits(
    tmp_path: Path, die_after: int, averaging: bool
) -> None:
    whole, whole_log, _ = train(tmp_path / "whole", patience=3, keep_best=True, averaging=averaging)
    with pytest.raises(Killed):
        train(tmp_path / "killed", patience=3, keep_best=True, die_after=die_after, averaging=averaging)
    resumed, log, _ = train(tmp_path / "killed", patience=3, keep_best=True, averaging=averaging)
    assert same(whole, resumed)
    assert log == whole_log
    again, log, seen = train(tmp_path / "killed", patience=3, keep_best=True, averaging=averaging)
    assert (same(whole, again), log, seen) == (True, whole_log, {})  # what is over is not trained again


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Averaging optimizers change the weights for a look, and back: not a bit may differ afterwards."""
    for averaging in (False, True):
        looked, log, _ = train(tmp_path / f"looked-{averaging}", patience=None, keep_best=False, averaging=averaging)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EvalHooks, "look", lambda *_: {})
            alone, alone_log, _ = train(
                tmp_path / f"alone-{averaging}", patience=None, keep_best=False, averaging=averaging
            )
        assert same(looked, alone)
        assert [row["loss"] for row in log] == [row["loss"] for row in alone_log]


def test_a_held_out_loss_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "DOWN_THEN_UP", [5.0, math.nan])
    with pytest.raises(Diverged, match="held-out loss of nan"):
        train(tmp_path, patience=None, keep_best=True)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "one", patience=None, keep_best=False)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(BadData) as caught:
        train(tmp_path / "two", patience=None, keep_best=False)
    assert caught.value.exit_code == 65
    assert str(caught.value) == (
        f"{tmp_path}/two/step-00000012: the checkpoint is of another training\n"
        "  got:      a checkpoint of one\n"
        "  expected: two\n"
        "  to fix:   remove the folder: the training then begins anew"
    )


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    train(tmp_path, patience=None, keep_best=False)
    wide = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Linear(9, 1))
    course = TrainingPlan(STEPS, lambda step: 0.01, lambda step: [], lambda step: [], 1.0, 3)
    with pytest.raises(BadData, match="the checkpoint is of another training") as caught:
        train_loop(
            course,
            dict(wide.named_parameters()),
            [torch.optim.AdamW(wide.parameters())],
            tmp_path,
            Progress("t", 1, "s"),
        )
    assert (caught.value.got, caught.value.expected) == ("0.bias: (8,)", "(9,)")


def test_a_folder_where_no_checkpoint_can_be_written_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BadInput, match="checkpoints cannot be written") as caught:
        train(tmp_path / "file", patience=None, keep_best=False, die_after=1)
    assert caught.value.exit_code == 65

    def refused(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tasks.engine.checkpoints.TemporaryFile", refused)
    with pytest.raises(BadInput, match="checkpoints cannot be written") as caught:
        train(tmp_path / "folder", patience=None, keep_best=False, die_after=1)
    assert caught.value.got == "Permission denied"
