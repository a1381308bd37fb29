from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.run import prefect_server
from tasks.core.errors import TemperError
from tests.helpers.commands import ROOT, environment

SAY = """
import os, sys
from pathlib import Path
from flows.run import prefect_server as servers
servers.prepare_servers(Path(sys.argv[1]), terminal=False)
from tasks.orchestration.dvc_session import child_environment
print(child_environment().get("HF_HUB_OFFLINE"), os.environ["MLFLOW_DISABLE_TELEMETRY"], servers.temporary(),
    os.environ.get("PREFECT_API_URL"))
"""

NOTE = """
import sys
from pathlib import Path
from flows.run import prefect_server as servers
servers._note(Path(sys.argv[1]), 1, sys.argv[2])
print(flush=True)
input()
"""


def prepared(workspace: Path, **extra: str) -> list[str]:
    variables = {name: value for name, value in environment(**extra).items() if name != "HF_HUB_OFFLINE" or extra}
    said = subprocess.run(
        [sys.executable, "-c", SAY, str(workspace)], env=variables, capture_output=True, text=True, check=True
    )
    return said.stdout.split()


def test_a_stage_may_fetch_what_params_pin_and_others_may_not_unless_the_user_says_so(tmp_path: Path) -> None:
    """Every stage sets HF_HUB_OFFLINE itself but `base` of kind hub; it must not inherit it from the flow."""
    assert prepared(tmp_path) == ["None", "true", "True", "None"]
    assert prepared(tmp_path, HF_HUB_OFFLINE="1")[0] == "1"
    assert prepared(tmp_path, PREFECT_API_URL="http://127.0.0.1:1/api")[2] == "False"


def test_a_note_is_believed_where_it_was_written_and_while_its_writer_lives(tmp_path: Path) -> None:
    """A workspace that is copied while a schedule is served has the note of a server that is not its own."""
    original, copied = tmp_path / "original", tmp_path / "a copy"
    (original / ".temper").mkdir(parents=True)
    api = "http://127.0.0.1:9/api"
    with subprocess.Popen(
        [sys.executable, "-c", NOTE, str(original), api],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as writer:
        assert writer.stdout
        writer.stdout.readline()
        shutil.copytree(original, copied)
        assert prepared(original)[2:] == ["False", api]
        assert prepared(copied)[2:] == ["True", "None"]
        writer.kill()
    assert prepared(original)[2:] == ["True", "None"]


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "nonsense://")
    monkeypatch.setattr(prefect_server, "_STARTS", 1)
    monkeypatch.setattr(prefect_server, "_WATCH_S", 0.1)
    monkeypatch.setattr(prefect_server, "_ANSWERS_S", 0.5)
    monkeypatch.chdir(ROOT)
    with pytest.raises(TemperError, match="Prefect's server does not start"), prefect_server.kept_up(tmp_path):
        raise AssertionError("it does not answer")
    assert "nonsense" in (tmp_path / ".temper" / prefect_server.LOG).read_text()
    assert "PREFECT_API_URL" not in os.environ
