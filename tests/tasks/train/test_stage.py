"""The stage `train@METHOD` as a whole, in this process, on a workspace whose rows and base are made by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.run.edit_params import change_params
from tasks.adapters.attach import init_adapter
from tasks.core.artifacts import atomic_folder, read_manifest
from tasks.core.errors import BadModel
from tasks.core.parquet import write_rows
from tasks.core.progress import Progress
from tasks.inference.rows import TokenRow
from tasks.models.device import seed_everything
from tasks.render.stage import rendered_schema
from tasks.train.losses import _LOSSES, StepLosses
from tasks.train.params import Method
from tasks.train.stage import main
from tests.helpers.samples import ADALORA, LORA, ORPO, SFT, method
from tests.helpers.training import held_out_loss, train
from tests.tasks.core.test_memory import CPU
from tests.tasks.train.test_trainer import examples

ROWS = 12


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """Twelve chats to learn and six held out."""
    return write_chats(tmp_path / "rendered", {"train": ROWS, "held_out": 6})


def write_chats(target: Path, counts: dict[str, int]) -> Path:
    with atomic_folder(target) as folder:
        for split, count in counts.items():
            rows = [
                {"id": str(n), "family": "", "ids": row.ids, "mask": row.mask, "prompt_tokens": row.prompt_tokens}
                for n, (row,) in enumerate(examples("qlora", count))
                if isinstance(row, TokenRow)
            ]
            (folder / split).mkdir()
            write_rows(folder / split / "chat.parquet", rows, rendered_schema("chat"))
    return target


@pytest.fixture
def stage(
    workspace: Path,
    pico_base: Path,
    rendered: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Runs the stage with some settings; returns its exit code and what it said."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("tasks.core.stage.die_with_owner", lambda: None)

    def run(**settings: Any) -> tuple[int, str]:
        small = {"batch_size": 4, "micro_batch_size": 4, "checkpoint_every_steps": 2, "warmup_steps": 1}
        values = [f"train.reft.{name}={json.dumps(value)}" for name, value in (small | settings).items()]
        change_params(workspace, None, values)
        out = str(workspace / "data" / "adapters" / "reft")
        words = ["reft", "--base", str(pico_base), "--rendered", str(rendered), "--out", out]
        monkeypatch.setattr(sys, "argv", ["tasks.train", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(str(ended.code))
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return run


def adapter(workspace: Path) -> Path:
    return workspace / "data" / "adapters" / "reft"


def test_it_evaluates_samples_and_keeps_the_best(stage: Any, workspace: Path) -> None:
    code, said = stage(
        epochs=4,
        schedule={"wsd": 0.5},
        evaluation={"every_steps": 3, "early_stopping_patience": 9, "keep": "best"},
        samples={"every_steps": 5, "prompts": 2, "max_new_tokens": 3},
    )
    assert code == 0, said
    read_manifest(adapter(workspace))
    log = [json.loads(line) for line in (adapter(workspace) / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out_loss"] for row in log if "held_out_loss" in row}
    assert list(losses) == [3, 6, 9, 12]
    assert log[6]["learning_rate"] > log[8]["learning_rate"] > log[11]["learning_rate"] > 0
    summary = json.loads((adapter(workspace) / "summary.json").read_text())
    best = min(losses, key=lambda step: losses[step])
    assert (summary["steps"], summary["planned_steps"], summary["kept_step"]) == (12, 12, best)
    assert summary["held_out_loss_after"] == losses[best]
    assert set(summary["data"]) == {"train/chat.parquet", "held_out/chat.parquet"}
    samples = [json.loads(line) for line in (adapter(workspace) / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [5, 5, 10, 10, 12, 12]
    assert {tuple(sample) for sample in samples} == {("prompt", "reply", "step")}
    assert samples[0]["prompt"] == samples[2]["prompt"] != samples[1]["prompt"]
    assert f"kept the weights of step {best}, the best" in said


def test_it_stops_early_and_says_so(stage: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.25, 4.0, 4.0])  # before; after each epoch; of what was kept
    monkeypatch.setattr(StepLosses, "held_out", lambda *_: next(losses))
    code, said = stage(epochs=9, evaluation={"every_steps": 3, "early_stopping_patience": 2, "keep": "last"})
    assert code == 0, said
    assert "train reft: stopped early: no lower held-out loss in 2 evaluations" in said
    assert "train reft: 9 of 27 steps, held-out loss 5.000 -> 4.000" in said
    summary = json.loads((adapter(workspace) / "summary.json").read_text())
    assert (summary["steps"], summary["planned_steps"], summary["kept_step"]) == (9, 27, 9)


def test_a_loss_that_grew_by_more_than_a_blind_guess_has_publishes_nothing(
    stage: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, pico_base: Path
) -> None:
    blind = math.log(json.loads((pico_base / "config.json").read_text())["vocab_size"])
    for after, expected in ((1.0 + blind + 0.01, 65), (1.0 + blind - 0.01, 0)):
        losses = iter([1.0, after])
        monkeypatch.setattr(StepLosses, "held_out", lambda *_, given=losses: next(given))
        code, said = stage()
        assert code == expected, said
        assert adapter(workspace).exists() == (code == 0)
        if code:
            assert f"got:      a held-out loss of {after:.3f}, which was 1.000 before" in said
            assert "lower learning_rate" in said


def test_a_batch_larger_than_the_data_takes_all_of_it(stage: Any, workspace: Path) -> None:
    code, said = stage(batch_size=64, micro_batch_size=64, epochs=2)
    assert code == 0, said
    assert f"train reft: every step takes all {ROWS} rows, fewer than batch_size=64" in said
    assert "2 of 2 steps" in said


def test_what_is_missing_or_not_writable_is_told_at_once(stage: Any, workspace: Path) -> None:
    code, said = stage(report_to=["wandb"])
    assert (code, "got:      wandb" in said) == (65, True)
    (workspace / ".temper").mkdir(exist_ok=True)
    (workspace / ".temper" / "checkpoints").write_text("not a folder")
    code, said = stage(report_to=[])
    assert code == 65
    assert "checkpoints cannot be written" in said


def test_memory_that_runs_out_is_one_clear_error_or_none(
    stage: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _LOSSES["sft"]

    def capped(given: Any, asked: Any) -> Any:
        if len(given.examples) > 1:
            raise RuntimeError(CPU)
        return real(given, asked)

    monkeypatch.setitem(_LOSSES, "sft", capped)
    code, said = stage()
    assert code == 71
    assert "train.reft: memory ran out\n  got:" in said
    assert "set train.reft.fit_memory: true, or what `temper estimate --method reft` says would fit" in said
    code, said = stage(fit_memory=True)
    assert code == 0, said
    assert said.count("memory ran out") == 2  # 4 rows, 2, 1


def test_nothing_to_train_is_refused(pico_base: Path, tmp_path: Path) -> None:
    params = method(LORA, SFT)
    seed_everything(1)
    model = init_adapter(pico_base, params.adapter, 3).requires_grad_(False)
    with pytest.raises(BadModel, match="no trainable parameters"):
        train(model, examples("qlora"), params, tmp_path, Progress("t", 1, "steps"))


BEST = {"every_steps": 2, "early_stopping_patience": "never", "keep": "best"}
EARLY = {"every_steps": 2, "early_stopping_patience": 1, "keep": "last"}


@pytest.mark.parametrize(
    ("adapter", "changes", "said"),
    [
        (LORA, {"learning_rate": 0.0}, "greater than 0"),
        (LORA, {"learning_rate": 1000.0}, "less than or equal to 10"),
        (LORA, {"learning_rate": float("nan")}, "learning_rate"),
        (LORA, {"schedule": {"wsd": 0.0}}, "greater than 0"),
        (LORA, {"schedule": {"wsd": 1.5}}, "less than or equal to 1"),
        (LORA, {"evaluation": {**BEST, "early_stopping_patience": 0}}, "patience"),
        (LORA, {"optimizer": "adamw_schedule_free"}, "it needs `schedule: constant`"),
        (LORA, {"report_to": ["comet"]}, "'tensorboard' or 'wandb'"),
        (ADALORA, {"evaluation": BEST}, "adalora takes ranks away until its last step"),
        (ADALORA, {"evaluation": EARLY}, "adalora takes ranks away until its last step"),
    ],
)
def test_settings_that_mean_nothing_are_refused(adapter: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        method(adapter, ORPO, **changes)


def test_the_schedule_of_params_is_the_one_that_is_followed(pico_base: Path, tmp_path: Path) -> None:
    params: Method = method(LORA, SFT, learning_rate=1e-3, warmup_steps=0, schedule={"wsd": 0.5}, batch_size=2)
    rows = examples("qlora", 8)
    log = train(init_adapter(pico_base, params.adapter), rows, params, tmp_path, Progress("t", 4, "steps"))
    expected = [1e-3, 1e-3, 1e-3, 1e-3 * (1 - 0.5**0.5)]
    assert [row["learning_rate"] for row in log[:4]] == pytest.approx(expected)


def test_schedule_free_trains_and_publishes_its_average(pico_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    params = method(LORA, SFT, optimizer="adamw_schedule_free", schedule="constant", epochs=6)
    seed_everything(1)
    model = init_adapter(pico_base, params.adapter, 18)
    rows = examples("qlora")
    before = held_out_loss(model, rows, params)
    train(model, rows, params, tmp_path, Progress("t", 1, "steps"))
    kept = max(tmp_path.glob("step-*"))
    from safetensors.torch import load_file

    trained_on = load_file(kept / "state.safetensors")
    now = dict(model.named_parameters())
    name = next(key for key in trained_on if key.startswith("parameter/"))
    assert not torch.equal(now[name.removeprefix("parameter/")].float(), trained_on[name].float())
    assert held_out_loss(model, rows, params) < before - 0.05
