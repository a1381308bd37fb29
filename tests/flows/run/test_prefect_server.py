from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from flows.run.prefect_server import end_old_server, note_server
from tests.helpers.commands import environment

SAY = """
import os, sys
from pathlib import Path
from flows.run import prefect_server as servers
servers.prepare_servers(Path(sys.argv[1]), terminal=False)
from tasks.orchestration.dvc_session import child_environment
print(child_environment().get("HF_HUB_OFFLINE"), os.environ["MLFLOW_DISABLE_TELEMETRY"], servers.temporary())
"""


def prepared(workspace: Path, **extra: str) -> list[str]:
    variables = {name: value for name, value in environment(**extra).items() if name != "HF_HUB_OFFLINE" or extra}
    said = subprocess.run(
        [sys.executable, "-c", SAY, str(workspace)], env=variables, capture_output=True, text=True, check=True
    )
    return said.stdout.split()


def test_a_stage_may_fetch_what_params_pin_and_others_may_not_unless_the_user_says_so(tmp_path: Path) -> None:
    """Every stage sets HF_HUB_OFFLINE itself but `base` of kind hub; it must not inherit it from the flow."""
    assert prepared(tmp_path) == ["None", "true", "True"]
    assert prepared(tmp_path, HF_HUB_OFFLINE="1")[0] == "1"
    assert prepared(tmp_path, PREFECT_API_URL="http://127.0.0.1:1/api")[2] == "False"


def test_a_copy_of_a_workspace_does_not_end_the_server_of_the_original(tmp_path: Path) -> None:
    """A workspace that is copied while it runs has the note of the server that the original still talks to."""
    original, copied = tmp_path / "original", tmp_path / "a copy"
    (original / ".temper").mkdir(parents=True)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)", "prefect.server"]  # as a server's command reads
    with subprocess.Popen(sleeping) as server:
        note_server(original)
        shutil.copytree(original, copied)
        assert not end_old_server(copied)
        assert server.poll() is None
        assert end_old_server(original)
        server.wait(timeout=10)
