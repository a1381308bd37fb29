"""The servers a run talks to: Prefect's own or a temporary one, and MLflow's UI. All bind to this machine alone.

`prepare_servers` must be called before Prefect is imported: it reads its settings from the environment once.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import as_json, atomic_write
from tasks.core.errors import TemperError
from tasks.core.stage import quiet_libraries
from tasks.registry.client import tracking_uri

if TYPE_CHECKING:
    import psutil


MLFLOW_PORT, PREFECT_PORT = 5000, 4200
_WAIT_S, _WATCH_S = 0.5, 2.0


def prepare_servers(workspace: Path, *, terminal: bool) -> None:
    """Set the environment for Prefect and the libraries below; what the user has set stays.

    Args:
        workspace: its `.temper/prefect` is Prefect's home, so that no other project's runs are mixed in.
        terminal: whether progress is shown as a board, beside which Prefect's own log lines would be noise.
    """
    quiet_libraries(offline=False)  # stages inherit this environment, and one of them may fetch what params pin
    defaults = {
        "PREFECT_HOME": str(workspace / ".temper" / "prefect"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_PROMPT": "false",
    }
    served = _noted(workspace)
    if temporary() and served and not served["temporary"]:
        os.environ["PREFECT_API_URL"] = served["api"]
    if temporary():
        defaults |= {
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
        }
    if terminal:
        defaults["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def temporary() -> bool:
    """Return whether runs start a Prefect server for themselves."""
    return "PREFECT_API_URL" not in os.environ


def ui_commands(workspace: Path) -> dict[str, str]:
    """Return the exact commands that open MLflow and Prefect on what this workspace recorded."""
    binaries = Path(sys.executable).parent
    uri, home = tracking_uri(workspace), workspace / ".temper" / "prefect"
    mlflow = f"{shlex.quote(str(binaries / 'mlflow'))} ui --backend-store-uri {shlex.quote(uri)} --port {MLFLOW_PORT}"
    prefect = f"{shlex.quote(str(binaries / 'prefect'))} server start --port {PREFECT_PORT}"
    return {
        "MLflow": f"open {uri}" if uri.startswith("http") else mlflow,
        "Prefect": f"PREFECT_HOME={shlex.quote(str(home))} {prefect}"
        if temporary()
        else f"open {os.environ['PREFECT_API_URL'].removesuffix('/api')}",
    }


def run_link(workspace: Path, experiment: str, run: str) -> str:
    """Return the address of a run in MLflow's UI."""
    uri = tracking_uri(workspace)
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{MLFLOW_PORT}"
    return f"{server}/#/experiments/{experiment}/runs/{run}"


def end_old_server(workspace: Path) -> bool:
    """End the temporary server of a run that was killed; return whether there was one."""
    note = _noted(workspace)
    if note is None or not note["temporary"]:
        return False
    _end(note["process"])
    return True


def note_server(workspace: Path) -> None:
    """Record which process is this run's temporary server, for `end_old_server`."""
    import psutil

    for child in psutil.Process().children():
        if any("prefect.server" in part for part in child.cmdline()):
            _note(workspace, child.pid, temporary=True)


@contextmanager
def kept_up(workspace: Path) -> Iterator[str]:
    """Keep a Prefect server up while the block runs: the user's own, or one on this machine, restarted if it dies.

    Yields:
        The address of its API, which answers when the block begins.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    note = _noted(workspace)
    if note and note["api"] == os.environ.get("PREFECT_API_URL"):  # left by a schedule that was killed
        api, found = str(note["api"]), note["process"]
    elif temporary():
        api, found = f"http://127.0.0.1:{_free_port()}/api", None
    else:
        wait_for(os.environ["PREFECT_API_URL"])
        yield os.environ["PREFECT_API_URL"]
        return
    os.environ["PREFECT_API_URL"] = api  # for the processes of runs
    with _server(workspace, api, found), temporary_settings({PREFECT_API_URL: api}):  # the environment was read by now
        wait_for(api)
        yield api


@contextmanager
def _server(workspace: Path, api: str, server: psutil.Process | None) -> Iterator[None]:
    """Keep a server at an address up, and end it with the block."""
    import psutil

    port = api.removesuffix("/api").rpartition(":")[2]
    ending = threading.Event()

    def keep_up() -> None:
        nonlocal server
        while not ending.is_set():
            if server is None or not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
                command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
                with (workspace / ".temper" / "prefect-server.log").open("ab") as log:
                    server = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)
                _note(workspace, server.pid, temporary=False, api=api)
            ending.wait(_WATCH_S)

    keeper = threading.Thread(target=keep_up, name="keeps the server up")
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        keeper.join()
        if server is not None:
            _end(server)


def _end(server: psutil.Process) -> None:
    """End a server; kill it when it does not end by itself."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        server.terminate()
        try:
            server.wait(timeout=10)
        except psutil.TimeoutExpired:
            server.kill()


def _free_port() -> int:
    """Return Prefect's own port, or another one when that is taken."""
    for port in (PREFECT_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise TemperError("no port is free on 127.0.0.1")


def wait_for(api: str) -> None:
    """Wait until the server at this address answers."""
    import httpx

    told = False
    while True:
        try:
            if httpx.get(f"{api}/health", timeout=5).is_success:
                return
        except httpx.HTTPError as error:
            if not told and not isinstance(error, httpx.ConnectError):
                print(f"waiting for {api}: {error}", flush=True)
            told = True
        time.sleep(_WAIT_S)


def _note_file(workspace: Path) -> Path:
    return workspace / ".temper" / "prefect-server.json"


def _note(workspace: Path, pid: int, *, temporary: bool, api: str = "") -> None:
    import psutil

    about = {
        "pid": pid,
        "created": psutil.Process(pid).create_time(),
        "temporary": temporary,
        "api": api,
        "workspace": str(workspace.resolve()),  # a copy of the folder has the note, but not the server
    }
    atomic_write(_note_file(workspace), as_json(about))


def _noted(workspace: Path) -> dict[str, Any] | None:
    """Return this workspace's recorded server with its `process`, if it is alive: of that id and begun at that time."""
    import psutil

    try:
        note: dict[str, Any] = json.loads(_note_file(workspace).read_text())
        if note["workspace"] != str(workspace.resolve()):
            return None
        process = psutil.Process(note["pid"])
        alive = process.create_time() == note["created"] and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return {**note, "process": process} if alive else None
