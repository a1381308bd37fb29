"""A run that is killed, interrupted or doubled: nothing is lost, nothing runs on, and the result is the same bits."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flows.run.edit_params import change_params
from flows.run.lock import held
from tasks.core import pipeline
from tasks.core.stage import words_of
from tests.conftest import Beside, digests, dvc, temper, wait_for

LONG = ["train.qlora.epochs=10", "train.qlora.checkpoint_every_steps=10"]
"""A training of 70 steps: some seconds, in which it can be disturbed."""


def stage_process(workspace: Path, stage: str) -> int | None:
    """The process id of a stage that runs in a workspace."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if words_of(process)[1:4] == ["-m", *stage.split()] and process.cwd() == str(workspace):
                return int(process.pid)
    return None


def checkpointed(workspace: Path) -> bool:
    return any((workspace / ".temper" / "checkpoints").glob("*/step-*/manifest.json"))


@pytest.fixture
def longer(copy: Path) -> Path:
    """A copy of the finished workspace whose QLoRA training is to be run anew."""
    shutil.copyfile(copy / "params.yaml", copy / "recipes" / "before.yaml")
    change_params(copy, None, LONG)
    shutil.rmtree(copy / ".temper" / "checkpoints")  # of the first run; the next one would remove them, but later
    return copy


@pytest.fixture(scope="module")
def undisturbed(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the adapter that this training makes when nobody disturbs it."""
    workspace = tmp_path_factory.mktemp("undisturbed") / "work space"
    shutil.copytree(factory, workspace, symlinks=True)
    change_params(workspace, None, LONG)
    dvc(workspace, "repro", "--single-item", "train@qlora")
    return digests(workspace, "data/adapters/qlora")


def test_a_killed_training_is_retried_and_ends_with_the_same_bits(longer: Path, undisturbed: dict[str, str]) -> None:
    with Beside(longer, "run") as run:
        wait_for("checkpoint", lambda: checkpointed(longer), run)
        victim = stage_process(longer, "tasks.train qlora")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert run.process.wait(timeout=300) == 0, run.said()
    assert re.search(r"Retry|retry", run.said())
    assert re.search(r"going on from the checkpoint after step \d+ of", run.said()), run.said()
    assert digests(longer, "data/adapters/qlora") == undisturbed
    client = sqlite3.connect(longer / ".temper" / "mlflow.db")
    key = pipeline.recorded_keys(longer)["train@qlora"]
    (count,) = client.execute("select count(*) from tags where key = 'temper.key' and value = ?", (key,)).fetchone()
    assert count == 1  # the retry went on with the same MLflow run
    logged = "select step from metrics where key = 'loss' and run_uuid in (select run_uuid from tags where value = ?)"
    assert [row[0] for row in client.execute(logged + " order by step", (key,))] == list(range(1, 71))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_checkpoint_and_the_next_run_goes_on_from_it(
    longer: Path, undisturbed: dict[str, str], sent: signal.Signals
) -> None:
    """Both come to the whole process group, as from a terminal and from `timeout`: also to Prefect's server."""
    with Beside(longer, "run") as run:
        wait_for("training", lambda: re.search(r"\d+/\d+ steps", run.said()), run)
        os.killpg(run.process.pid, sent)
        assert run.process.wait(timeout=60) == 75, run.said()
    assert "`temper run` goes on from here" in run.said()
    assert "Traceback" not in run.said()
    assert checkpointed(longer)
    comment(longer, "tasks/engine/loop.py", "tasks/core/stage.py")  # which code ran is no part of a checkpoint's key
    assert "going on from the checkpoint" in dvc(longer, "repro", "--single-item", "train@qlora")
    assert digests(longer, "data/adapters/qlora") == undisturbed


def comment(workspace: Path, *files: str) -> None:
    """Change nothing in some files of code but a comment."""
    for name in files:
        file = workspace / name
        file.write_text(f"{file.read_text()}\n# a comment\n")


def test_a_killed_flow_leaves_no_process_and_no_ghost(longer: Path) -> None:
    with Beside(longer, "run") as run:
        wait_for("checkpoint", lambda: checkpointed(longer), run)
        run.process.kill()
        run.process.wait()
        started = time.monotonic()
        with held(longer, "the test"):
            assert time.monotonic() - started < 5
        wait_for("end of the training", lambda: stage_process(longer, "tasks.train qlora") is None, run, 10)
    change_params(longer, longer / "recipes" / "before.yaml", [])  # what ran first: DVC restores it
    done = temper(longer, "run")
    assert "marked 1 earlier runs as crashed" in done.stderr
    with sqlite3.connect(longer / ".temper" / "prefect" / "prefect.db") as database:
        states = [row[0] for row in database.execute("select state_type from flow_run where name is not null")]
    assert "RUNNING" not in states
    assert states.count("CRASHED") == 1


def test_a_second_run_says_who_holds_the_workspace(copy: Path) -> None:
    with held(copy, "temper run"):  # not of the shared one, which other tests use at the same time
        done = temper(copy, "run", code=75)
    assert f"temper run (process {os.getpid()}) holds the workspace since" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_same_content_registered_twice_is_the_same_version(copy: Path) -> None:
    note = copy / "data" / "reports" / "qlora" / "registered.json"
    before = note.read_bytes()
    note.unlink()  # as if the stage had been killed after it had made the version
    assert "register@qlora" in dvc(copy, "repro", "--single-item", "register@qlora")
    assert note.read_bytes() == before


def test_a_changed_comment_registers_no_second_version(copy: Path) -> None:
    note = copy / "data" / "reports" / "qlora" / "registered.json"
    before = note.read_bytes()
    comment(copy, "tasks/register/sbom.py", "tasks/core/errors.py")
    assert "Running stage 'register@qlora'" in dvc(copy, "repro", "--single-item", "register@qlora")
    assert note.read_bytes() == before
    with sqlite3.connect(copy / ".temper" / "mlflow.db") as database:
        assert database.execute("select count(*) from model_versions").fetchone() == (3,)
