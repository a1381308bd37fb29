"""Process between the server and an engine: the engine, which is no program of temper's, ends when the server does.

    python -m flows.serve.engines.keeper FOLDER PROGRAM WORD...

It is the first of a session, in which the engine and whatever that starts are. When the process that started it is
gone, it kills them all, and removes the folder that was made for the engine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tasks.core.stage import OWNER

_WATCH_S = 0.5
_OURS = ("PYTHON", "VIRTUAL_ENV", "TEMPER_", "MLFLOW_", "PREFECT_", "DVC_")
"""What variables begin with that are of this environment and its servers, not of the engine's."""
_THREADS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Set for processes that share a machine; an engine has its own way to wait."""


def environment_of(variables: Mapping[str, str], program: str) -> dict[str, str]:
    """Return the variables that an engine gets: none of temper's own environment, keys among them.

    Programs beside it come first on PATH, as in an environment that was activated.
    """
    kept = {name: value for name, value in variables.items() if not name.startswith(_OURS) and name not in _THREADS}
    return kept | {"PATH": os.pathsep.join([str(Path(program).absolute().parent), variables.get("PATH", os.defpath)])}


def main() -> None:
    """Run the command of the arguments, and end with its exit code."""
    import psutil

    owner = psutil.Process(int(os.environ[OWNER]))
    scratch, *command = sys.argv[1:]
    engine = subprocess.Popen(command, env=environment_of(os.environ, command[0]), stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: engine.terminate())

    def watch() -> None:
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_WATCH_S)
        shutil.rmtree(scratch, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-owner", daemon=True).start()
    code = engine.wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
