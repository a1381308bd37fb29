"""What the fork server starts is, as far as a stage can tell, what DVC would have started without it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core.stage import words_of
from tasks.orchestration.fork_server import Command, ForkedProcess, ForkServer
from tests.conftest import ROOT, dvc, git
from tests.helpers.commands import environment

LIBRARIES = ("json.tool", "dvc.repo")
ASKED = {"PYTHONUNBUFFERED": "1", "SHELL": "/bin/sh"}

PROBE = """
import json, os, resource, signal, sys
from pathlib import Path

what, out = sys.argv[1:]
if what == "refuse":
    print("refused", file=sys.stderr)
    sys.exit(65)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    print("waiting", flush=True)
    signal.pause()
Path(out).write_text(json.dumps({
    "argv": sys.argv,
    "name": __name__,
    "module": sys.modules["__main__"].__spec__.name,
    "path": sys.path,
    "folder": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("_", "PWD", "SHLVL", "PYTEST_CURRENT_TEST")},
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    "descriptors": len(os.listdir("/proc/self/fd")),
    "leads": os.getsid(0) == os.getpid(),
    "threads": len(os.listdir("/proc/self/task")),
    "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    "shown": Path("/proc/self/cmdline").read_text().rstrip("\\0").replace("\\0", " ").split()[1:],
}))
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a stage for each way to end, and this project's server as its own code."""
    folder = tmp_path_factory.mktemp("forks") / "work space"
    (folder / "tasks" / "orchestration").mkdir(parents=True)
    (folder / "tasks" / "__init__.py").touch()
    (folder / "tasks" / "orchestration" / "__init__.py").touch()
    shutil.copy(ROOT / "tasks" / "orchestration" / "fork_server.py", folder / "tasks" / "orchestration")
    (folder / "tasks" / "probe.py").write_text(PROBE)
    stages = {name: f"python -m tasks.probe {name} out-{name}" for name in ("refuse", "die", "wait", "tell")}
    stages["shell"] = "python -m tasks.probe tell out-$((1 + 1)) && mv out-2 out-shell"
    (folder / "dvc.yaml").write_text(
        json.dumps({"stages": {name: {"cmd": cmd, "outs": [f"out-{name}"]} for name, cmd in stages.items()}})
    )
    git(folder, "init", "--quiet")
    dvc(folder, "init", "--quiet")
    return folder


@pytest.fixture(scope="module")
def server(graph: Path) -> Iterator[ForkServer]:
    server = ForkServer(graph, environment(), graph / "log.txt", LIBRARIES)
    yield server
    server.close()


def dvc_of(graph: Path, *words: str) -> Command:
    return Command(["python", "-m", "dvc", *words], str(graph), environment(**ASKED))


def ran(process: ForkedProcess) -> tuple[int, str]:
    assert process.stdout is not None
    with process.stdout as output:
        said = output.read()
    return process.wait(timeout=60), said


def repro(stage: str) -> list[str]:
    return ["repro", "--single-item", "--force", stage]


@pytest.mark.parametrize("stage", ["tell", "shell"])
def test_a_stage_finds_what_it_would_find_without_the_server(graph: Path, server: ForkServer, stage: str) -> None:
    out = graph / f"out-{stage}"
    dvc(graph, *repro(stage), code=0, **ASKED)
    alone: dict[str, Any] = json.loads(out.read_text())
    code, said = ran(server.start(dvc_of(graph, *repro(stage))))
    assert code == 0, said
    forked: dict[str, Any] = json.loads(out.read_text())
    assert forked == alone
    assert f"Running stage '{stage}'" in said


def test_ends_of_stages_come_through_dvc_as_they_do_without_the_server(graph: Path, server: ForkServer) -> None:
    for stage, told in (("refuse", "exited with 65"), ("die", "exited with 137")):
        assert told in dvc(graph, *repro(stage), code=255, **ASKED)
        code, said = ran(server.start(dvc_of(graph, *repro(stage))))
        assert code == 255
        assert told in said
    assert "refused\n" in ran(server.start(dvc_of(graph, *repro("refuse"))))[1]
    assert ran(server.start(dvc_of(graph, "no-such-command")))[0] == 254
    code, said = ran(
        server.start(dvc_of(graph, "status", "tell"))
    )  # it runs no stage: the process for one ends by itself
    assert code == 0
    assert not leftover(server)


def leftover(server: ForkServer) -> list[psutil.Process]:
    return psutil.Process(server._process.pid).children(recursive=True)


def test_requests_run_side_by_side_and_a_group_is_killed_whole(graph: Path, server: ForkServer) -> None:
    waiting = server.start(dvc_of(graph, *repro("wait")))
    assert any(line == "waiting\n" for line in waiting.stdout or [])
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.05)
    (stage,) = psutil.Process(waiting.pid).children()
    assert words_of(stage) == ["python", "-m", "tasks.probe", "wait", "out-wait"]  # by which a run finds it
    assert os.getpgid(stage.pid) == os.getsid(stage.pid) == waiting.pid
    assert ran(server.start(dvc_of(graph, "--version")))[0] == 0
    os.killpg(waiting.pid, signal.SIGKILL)
    assert waiting.wait(timeout=60) == -signal.SIGKILL
    assert waiting.wait() == -signal.SIGKILL  # whoever asks again is told the same
    psutil.wait_procs([stage], timeout=10)
    assert not stage.is_running()


def test_a_lost_server_is_told_and_what_it_made_counts_as_killed(graph: Path) -> None:
    server = ForkServer(graph, environment(), graph / "log.txt", LIBRARIES)
    waiting = server.start(dvc_of(graph, *repro("wait")))
    assert any(line == "waiting\n" for line in waiting.stdout or [])
    server._process.kill()
    assert waiting.wait(timeout=60) == -signal.SIGKILL
    os.killpg(waiting.pid, signal.SIGKILL)
    server._process.wait()
    with pytest.raises(OSError, match=r"gone|Broken pipe"):
        server.start(dvc_of(graph, "--version"))
    server.close()
