"""TEMPER_LAUNCH: the stage `train` as several processes, whose end is the end of one. All tests run real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.run.edit_params import change_params
from tasks.core.artifacts import read_manifest
from tasks.engine.checkpoints import latest
from tasks.train.launcher import LAUNCH, code_of
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.tasks.train.test_stage import write_chats

CONFIGS = ROOT / "infra" / "launch"
STEPS = 24
SAMPLES = {"every_steps": 8, "prompts": 1, "max_new_tokens": 3}


def begin(workspace: Path, config: str, **settings: object) -> subprocess.Popen[str]:
    """Starts the stage; eleven rows in steps of four, one of which two processes cannot share evenly."""
    small = {"batch_size": 4, "micro_batch_size": 2, "checkpoint_every_steps": 2, "epochs": 8, "adapter.dropout": 0.1}
    looks = {"evaluation": {"every_steps": 8, "early_stopping_patience": "never", "keep": "best"}, "samples": SAMPLES}
    change_params(workspace, None, [f"train.reft.{k}={json.dumps(v)}" for k, v in (small | looks | settings).items()])
    if not (workspace / "rendered").exists():
        write_chats(workspace / "rendered", {"train": 11, "held_out": 5})
    words = ["reft", "--base", "models/tiny", "--rendered", "rendered", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.train", *words],
        cwd=workspace,
        env=environment(**{LAUNCH: f"infra/launch/{config}"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_stopped_it_ends_after_a_checkpoint_and_goes_on_from_there_with_sharded_weights(workspace: Path) -> None:
    stopped = begin(workspace, "gloo.yaml")
    while not any((workspace / ".temper" / "checkpoints").glob("*/step-*")):
        assert stopped.poll() is None, stopped.communicate()
    family = psutil.Process(stopped.pid).children()
    stopped.send_signal(signal.SIGTERM)
    said, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, said + errors
    assert errors.count("error: step ") == 1
    assert "the training was stopped" in errors
    assert not any(process.is_running() for process in family)

    assert not (workspace / "out").exists()
    (checkpoints,) = (workspace / ".temper" / "checkpoints").iterdir()
    reached = latest(checkpoints)
    assert reached is not None

    resumed = begin(workspace, "fsdp2.yaml")
    said, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said + errors
    assert said.count(f"going on from the checkpoint after step {reached.step} of {STEPS}") == 1
    assert said.count(f"train reft: {STEPS} of {STEPS} steps") == 1
    read_manifest(workspace / "out")
    log = [json.loads(line) for line in (workspace / "out" / "log.jsonl").read_text().splitlines()]
    assert log[: reached.step] == reached.log
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert [row["step"] for row in log if "held_out_loss" in row and len(row["samples"]) == 1] == [8, 16, 24]


def test_what_several_processes_cannot_do_is_refused_once(workspace: Path) -> None:
    process = begin(workspace, "gloo.yaml", fit_memory=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 65, errors
    assert errors.count("error: train.reft.fit_memory: several processes cannot fit their rows to memory") == 1
    assert "true, in 2 processes" in errors
    assert not (workspace / "out").exists()


def ended(ends: str) -> subprocess.CompletedProcess[str]:
    """Two processes that were launched together, each of which ends as it is told."""
    call = f"launch(Path({str(CONFIGS / 'gloo.yaml')!r}), 'tests.tasks.core.failing_process', [{ends!r}])"
    program = f"import sys; from pathlib import Path; from tasks.train.launcher import launch; sys.exit({call})"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("ends", "code"), [("wait,65", 65), ("0,0", 0)])
def test_the_end_of_one_process_is_that_of_all(ends: str, code: int) -> None:
    done = ended(ends)
    assert done.returncode == code, done.stderr


def test_what_all_processes_end_by_is_told_once() -> None:
    done = ended("tell,tell")
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("error: the training was stopped") == 1


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([75, 75], 75),
        ([75, 65], 65),
        ([-15, 71], 71),
        ([1, 75], 1),
        ([-15, 75], 75),
        ([75, -9], 137),
        ([-15], 143),
    ],
)
def test_the_code_is_that_of_the_process_that_knows_why(codes: list[int], code: int) -> None:
    assert code_of(codes) == code


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_every_shipped_configuration_is_one_of_accelerate_and_in_its_page(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == 2
    assert f"| `{path.name}` |" in (ROOT / "docs" / "distributed.md").read_text()


def test_a_configuration_that_is_not_there_is_told(workspace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tasks.train", "reft", "--base", "b", "--rendered", "r", "--out", "o"],
        cwd=workspace,
        env=environment(**{LAUNCH: "infra/launch/none.yaml"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 65
    assert "error: infra/launch/none.yaml: does not exist" in done.stderr
