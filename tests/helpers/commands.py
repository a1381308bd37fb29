"""Commands as users type them, each in a process of its own that is forked from one with the libraries imported.

What it is to be started by the shell, and to import everything, is the matter of tests that use `subprocess`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tasks.orchestration.fork_server import LIBRARIES, Command, ForkServer

ROOT = Path(__file__).resolve().parent.parent.parent


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: this Python's programs first, and no server of the machine's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **extra}


@cache
def _server() -> ForkServer:
    """The server of this session's process, which ends with it."""
    log = Path(tempfile.mkdtemp()) / "fork-server.log"
    return ForkServer(ROOT, environment(), log, [*LIBRARIES, "mlflow.pyfunc", "great_expectations", "datasets"])


def run_module(folder: Path, *words: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs `python -m WORDS` in a folder; kills it when it takes too long."""
    command = Command(["python", "-m", *words], str(folder), environment())
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = _server().fork(command, out.fileno(), err.fileno())
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command.words, code, out.read(), err.read())
