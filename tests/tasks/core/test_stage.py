"""What a stage is as a process: exit codes, orphans, edits while it runs. Every test runs real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tasks.core import pipeline
from tasks.orchestration.dvc_session import PipelineRun, stage_exit_code
from tests.conftest import ROOT, dvc, git
from tests.helpers.commands import environment

PARAMS = "work:\n  do: nothing\n  seconds: 0\n"
PIPELINE = """
stages:
  work:
    cmd: python -m tasks.work --out out
    deps:
      - input.txt
      - tasks/work
    params:
      - work
    outs:
      - out
"""
WORK = """
import errno
import os
import sys
import time
from pathlib import Path
from ruamel.yaml import YAML
from tasks.core import stage as process
from tasks.core.errors import BadData, Interrupted, TemperError
from tasks.core.artifacts import atomic_folder

with process.run_stage(__doc__, "out") as stage:
    what = YAML(typ="safe").load(Path("params.yaml"))["work"]
    Path("key.txt").write_text(stage.key)
    with atomic_folder(stage.path("out")) as folder:
        (folder / "done").write_text("done")
        Path("running").write_text(str(os.getpid()))
        time.sleep(what["seconds"])
        if what["do"] == "bad":
            raise BadData("is wrong", where="input.txt:1", got="x", expected="y", fix="write y")
        if what["do"] == "transient":
            raise Interrupted("was stopped")
        if what["do"] == "fault":
            raise TemperError("cannot")
        if what["do"] == "crash":
            raise ZeroDivisionError
        if what["do"] == "kill":
            os.kill(os.getpid(), 9)
        if what["do"] == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "out/big")
        if what["do"] == "fill":
            (folder / "big").write_bytes(bytes(64 << 20))
        if what["do"] == "fill-with-tensors":
            import torch
            from safetensors.torch import save_file
            save_file({"big": torch.zeros(16 << 20)}, folder / "big.safetensors")
        if what["do"] == "read-only":
            raise OSError(errno.EROFS, "Read-only file system", "out/big")
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A workspace with a single stage that does what its params say."""
    folder = tmp_path / "small work space"
    (folder / "tasks" / "work").mkdir(parents=True)
    (folder / "tasks" / "__init__.py").write_text("")
    shutil.copytree(ROOT / "tasks" / "core", folder / "tasks" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tasks" / "work" / "__init__.py").write_text("")
    (folder / "tasks" / "work" / "__main__.py").write_text(WORK)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "input.txt").write_text("1")
    git(folder, "init", "--quiet")
    dvc(folder, "init", "--quiet")
    shutil.copy(ROOT / ".dvcignore", folder)
    return folder


def say(folder: Path, do: str, seconds: float = 0) -> None:
    (folder / "params.yaml").write_text(f"work:\n  do: {do}\n  seconds: {seconds}\n")


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.work", "--out", "out"]
    return subprocess.run(
        command, cwd=folder, env=environment(DVC_STAGE="work"), capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("do", "code", "said"),
    [
        ("nothing", 0, ""),
        ("bad", 65, "error: input.txt:1: is wrong\n  got:      x\n  expected: y\n  to fix:   write y\n"),
        ("transient", 75, "error: was stopped\n"),
        ("fault", 1, "error: cannot\n"),
        (
            "full",
            75,
            (
                "error: the disk is full\n  got:      [Errno 28] No space left on device: 'out/big'\n"
                "  to fix:   free some space, then run it again\n"
            ),
        ),
        ("read-only", 65, "error: out/big: Read-only file system\n  to fix:   make it writable\n"),
    ],
)
def test_exit_codes_and_one_readable_block(small: Path, do: str, code: int, said: str) -> None:
    say(small, do)
    done = run(small)
    assert (done.returncode, done.stderr) == (code, said)
    assert (small / "out").exists() == (code == 0)
    assert not list(small.glob(".out*"))


@pytest.mark.parametrize("do", ["fill", "fill-with-tensors"])
def test_a_disk_that_is_full_leaves_nothing_half_written_and_the_next_run_works(
    small: Path, tmp_path: Path, do: str
) -> None:
    disk = tmp_path / "small disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        workspace = shutil.copytree(small, disk / "w")
        say(workspace, do)
        done = run(workspace)
        assert (done.returncode, done.stderr[:24]) == (75, "error: the disk is full\n")
        assert [path.name for path in workspace.glob("*out*")] == []
        assert stage_exit_code(dvc(workspace, "repro", code=255).splitlines(), 255) == 75
        say(workspace, "nothing")
        dvc(workspace, "repro")
        assert (workspace / "out" / "done").read_text() == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_lock_that_another_process_holds_at_the_end_of_a_stage_costs_nothing_but_time(small: Path) -> None:
    """DVC by itself waits three seconds, then throws the finished work away."""
    say(small, "nothing", seconds=2)
    session = PipelineRun(small, None, {}, {}, frozenset({"work"}))  # type: ignore[arg-type]
    hold = """if True:
        import fcntl, pathlib, time
        while not pathlib.Path("running").exists():
            time.sleep(0.01)
        lock = open(".dvc/tmp/lock", "r+")
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(7)
    """
    (small / ".temper").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=small)
    outcome = session.run("work", 60, lambda line: None)
    holder.wait()
    assert outcome.state == "completed"
    assert outcome.seconds > 7
    assert "up to date" in dvc(small, "status")


def test_a_crash_keeps_its_traceback(small: Path) -> None:
    say(small, "crash")
    done = run(small)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert not (small / "out").exists()


@pytest.mark.parametrize("do", ["bad", "transient", "kill"])
def test_dvc_tells_the_code_of_a_stage_in_its_output(small: Path, do: str) -> None:
    """DVC itself returns 255 for all of them; this is the text that we read."""
    say(small, do)
    said = dvc(small, "repro", "--single-item", "work", code=255)
    assert stage_exit_code(said.splitlines(), 255) == {"bad": 65, "transient": 75, "kill": -9}[do] or do == "kill"
    if do == "kill":
        assert stage_exit_code(said.splitlines(), 255) in (-9, 137)


def test_the_content_key_is_the_one_that_dvc_records(small: Path) -> None:
    from tasks.core.pipeline import recorded_keys

    dvc(small, "repro")
    assert (small / "key.txt").read_text() == recorded_keys(small)["work"]


def test_by_hand_a_stage_has_the_key_that_dvc_gives_it(small: Path) -> None:
    dvc(small, "repro")
    recorded = (small / "key.txt").read_text()
    command = [sys.executable, "-m", "tasks.work", "--out", "out"]
    subprocess.run(command, cwd=small, env=environment(), check=True)
    assert (small / "key.txt").read_text() == recorded


def test_the_key_is_of_params_data_and_libraries_and_not_of_code(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return pipeline.content_key(small, pipeline.load(small)["work"])

    keys = [key()]
    work = small / "tasks" / "work" / "__main__.py"
    work.write_text(f"{work.read_text()}\n# a comment")
    (small / "params.yaml").write_text(f"# a comment\n{PARAMS}")
    assert key() == keys[0]
    say(small, "nothing", 1)
    keys.append(key())
    (small / "input.txt").write_text("other data")
    keys.append(key())
    monkeypatch.setattr(pipeline, "library_versions", lambda: {"torch": "0.0.1"})
    keys.append(key())
    assert len(set(keys)) == 4


def test_a_default_that_changes_is_in_the_key_and_words_about_it_are_not(small: Path) -> None:
    file = small / "tasks" / "work" / "params.py"

    def key(text: str, written: int) -> str:
        file.write_text(text)
        os.utime(file, ns=(0, written))  # so that a second write within a step of the clock is seen
        return pipeline.content_key(small, pipeline.load(small)["work"])

    before = key('class Work:\n    """Work."""\n\n    rate: float = 0.1\n    """Of learning."""\n', 1)
    assert key('class Work:\n    """Other."""\n\n    rate: float = 0.1  # said otherwise\n', 2) == before
    assert key('class Work:\n    """Work."""\n\n    rate: float = 0.2\n    """Of learning."""\n', 3) != before


def test_bytecode_that_python_writes_while_the_stage_runs_is_no_edit(small: Path) -> None:
    late = small / "tasks" / "work" / "late.py"
    late.write_text("")
    work = small / "tasks" / "work" / "__main__.py"
    work.write_text(work.read_text().replace("    what =", "    import tasks.work.late\n    what =", 1))
    dvc(small, "repro", PYTHONDONTWRITEBYTECODE="")
    assert list(late.parent.glob("__pycache__/late.*.pyc"))


def wait_for(path: Path, seconds: float = 30) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize(
    "edit",
    [
        "(folder / 'input.txt').write_text('2')",
        "(folder / 'params.yaml').write_text('work: {do: nothing, seconds: 3.0}')",
    ],
)
def test_an_edit_while_the_stage_runs_is_not_recorded_as_fresh(small: Path, edit: str) -> None:
    """DVC by itself would store the hashes of after the run and then say that nothing changed."""
    say(small, "nothing", 2)
    child = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=small,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
    )
    wait_for(small / "running")
    exec(edit, {"folder": small})
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 255
    assert "an input was edited while the stage ran" in output
    assert "exited with 75" in output
    assert "work" in dvc(small, "status")


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_orphan_writes_on_when_dvc_is_killed(small: Path, shell: str, number: signal.Signals) -> None:
    say(small, "nothing", 60)
    child = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=small,
        env=environment(SHELL=shell),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stage = psutil.Process(int(wait_for(small / "running")))
    child.send_signal(number)
    child.wait(timeout=10)
    stage.wait(timeout=5)
    assert not (small / "out").exists()


def test_no_orphan_writes_on_when_its_flow_is_killed(small: Path) -> None:
    """A stage watches the process that its environment names, whatever stands between them."""
    say(small, "nothing", 60)
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=small,
        env=environment(TEMPER_OWNER=str(owner.pid)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stage = psutil.Process(int(wait_for(small / "running")))
    owner.kill()
    owner.wait()
    stage.wait(timeout=5)
    assert child.wait(timeout=20) == 255


def test_libraries_are_told_to_be_quiet_and_the_user_has_the_last_word() -> None:
    script = textwrap.dedent("""
        import os
        from tasks.core.stage import OFFLINE, QUIET, quiet_libraries
        quiet_libraries()
        print(all(os.environ[name] == value for name, value in (QUIET | OFFLINE).items() if name != "HF_HUB_OFFLINE"))
        print(os.environ["HF_HUB_OFFLINE"])
    """)
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**clean, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "0"]
