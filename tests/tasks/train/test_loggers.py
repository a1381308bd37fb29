"""TensorBoard and Weights & Biases, by fakes of the small part of their interfaces that is used."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tasks.core.errors import BadParams
from tasks.train import loggers
from tasks.train.loggers import check_installed, reports

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "grad_norm": 1.0},
    {"step": 2, "loss": 1.5, "held_out_loss": 3.0, "samples": [{"prompt": "Hi", "reply": "Ho"}]},
]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the fakes were told."""
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def add_text(self, name: str, text: str, step: int) -> None:
            told.append((name, text, step))

        def close(self) -> None:
            told.append("close")

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            told.append((numbers, step))

        def finish(self) -> None:
            told.append("finish")

    def init(**given: Any) -> Run:
        told.append(given)
        if given["config"].get("fails"):
            raise CommError("no API key configured\nmore")
        return Run()

    class CommError(Exception):
        pass

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    vars(board)["SummaryWriter"] = SummaryWriter
    vars(wandb).update(init=init, errors=SimpleNamespace(Error=CommError))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    return told


def test_tensorboard_gets_numbers_and_texts_by_step(tmp_path: Path, said: list[Any]) -> None:
    with reports(["tensorboard"], tmp_path, "abc", "train qlora", {}) as (board,):
        for row in ROWS:
            board.log(row)
    assert said == [
        ("open", "train-qlora-abc", 1),
        ("loss", 2.0, 1),
        ("grad_norm", 1.0, 1),
        ("loss", 1.5, 2),
        ("held_out_loss", 3.0, 2),
        ("samples/0", "Hi\n\nHo", 2),
        "close",
    ]


def test_a_training_that_goes_on_shows_no_step_twice(tmp_path: Path, said: list[Any]) -> None:
    with reports(["tensorboard"], tmp_path, "abc", "train qlora", {}) as (board,):
        board.log(ROWS[1])
    assert said[0] == ("open", "train-qlora-abc", 2)


def test_wandb_gets_one_run_by_the_content_key(tmp_path: Path, said: list[Any]) -> None:
    with reports(["wandb"], tmp_path, "abc", "train qlora", {"epochs": 1}) as (run,):
        for row in ROWS:
            run.log(row)
    assert said[0] == {
        "project": "temper",
        "id": "abc",
        "name": "train qlora",
        "config": {"epochs": 1},
        "dir": str(tmp_path / ".temper"),
        "resume": "allow",
    }
    assert said[1:] == [({"loss": 2.0, "grad_norm": 1.0}, 1), ({"loss": 1.5, "held_out_loss": 3.0}, 2), "finish"]


def test_both_are_closed_when_a_training_fails(tmp_path: Path, said: list[Any]) -> None:
    with suppress(KeyError), reports(["tensorboard", "wandb"], tmp_path, "k", "t", {}) as each:
        each[0].log(ROWS[0])
        raise KeyError
    assert {"close", "finish"} <= {word for word in said if isinstance(word, str)}


def test_what_does_not_start_is_told_clearly(tmp_path: Path, said: list[Any]) -> None:
    with (
        pytest.raises(BadParams, match="Weights & Biases does not start") as caught,
        reports(["wandb"], tmp_path, "k", "t", {"fails": True}),
    ):
        raise AssertionError
    assert caught.value.got == "no API key configured"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_installed([])
    with pytest.raises(BadParams) as caught:
        check_installed(["tensorboard", "wandb"])
    assert caught.value.exit_code == 65
    assert str(caught.value) == (
        "train.*.report_to: what is to be reported to is not installed\n"
        "  got:      tensorboard, wandb\n"
        "  to fix:   pip install tensorboard wandb, or take it out of report_to"
    )
