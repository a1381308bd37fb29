"""The servers a run talks to: Prefect's own or a temporary one, and MLflow's UI. All bind to this machine alone.

`prepare_servers` must be called before Prefect is imported: it reads its settings from the environment once.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from flows.run.ending import Stopped
from flows.run.lock import state_folder
from tasks.core.artifacts import as_json, atomic_write
from tasks.core.errors import TemperError
from tasks.core.signals import kill_group
from tasks.core.stage import OWNER, quiet_libraries
from tasks.registry.client import tracking_uri

MLFLOW_PORT, PREFECT_PORT = 5000, 4200
_OWN = "TEMPER_PREFECT_API"
"""Environment variable: the address of the server that `kept_up` keeps up."""
LOG = "prefect-server.log"
Server: TypeAlias = subprocess.Popen[bytes]
_STARTS = 3
_WAIT_S, _ANSWERS_S, _WATCH_S, _DRAIN_S, _END_S = 0.1, 5, 2.0, 30, 3


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
    if api := _noted(workspace):
        defaults["PREFECT_API_URL"] = api
    if temporary():
        defaults["PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS"] = "1"
    if terminal:
        defaults["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def temporary() -> bool:
    """Return whether there is no Prefect server but one that a command of temper keeps up for itself."""
    return os.environ.get("PREFECT_API_URL") == os.environ.get(_OWN)


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


@contextmanager
def kept_up(workspace: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep a Prefect server up while the block runs, where the user has none: on this machine, restarted if it dies.

    Its address is in the environment within the block, and it answers when the block begins. It starts while Prefect is
    imported.

    Args:
        workspace: whose Prefect database it serves.
        shared: whether it has the UI and the services of a schedule, and other commands on this workspace use it.

    Raises:
        TemperError: it does not start.
    """
    if "PREFECT_API_URL" in os.environ:
        yield
        return
    with _listening(PREFECT_PORT if shared else 0) as listening:
        api = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        os.environ |= {"PREFECT_API_URL": api, _OWN: api}
        try:
            with _server(workspace, listening, api, shared=shared) as servers:
                from prefect.settings import PREFECT_API_URL, temporary_settings

                with temporary_settings({PREFECT_API_URL: api}):  # where Prefect has read the environment by now
                    wait_for(api, servers)
                    with _events_sent():
                        yield
        finally:
            for name in ("PREFECT_API_URL", _OWN):
                del os.environ[name]


@contextmanager
def _server(workspace: Path, listening: socket.socket, api: str, *, shared: bool) -> Iterator[Sequence[Server]]:
    """Keep a server up that answers at a socket, which is this process's so that no other can take its port.

    Yields:
        The servers that were started so far: the last one, and those that died.
    """
    command = [sys.executable, "-m", "flows.run.server_process", str(listening.fileno()), "shared" if shared else "own"]
    environment = {**os.environ, OWNER: str(os.getpid())}
    log = state_folder(workspace) / LOG
    ending = threading.Event()
    servers: list[Server] = []

    def keep_up() -> None:
        while not ending.is_set():
            if not servers or servers[-1].poll() is not None:
                with log.open("ab") as said:
                    server = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=said,
                        env=environment,
                        pass_fds=[listening.fileno()],
                        start_new_session=True,
                    )
                servers.append(server)
                if shared:
                    _note(workspace, server.pid, api)
            ending.wait(_WATCH_S)

    keeper = threading.Thread(target=keep_up, name="keeps the server up", daemon=True)
    keeper.start()
    try:
        yield servers
    finally:
        ending.set()
        keeper.join()
        for server in servers[-1:]:
            end_process(server, _END_S)


def end_process(process: Server, patience_s: float) -> None:
    """Ask a process that leads a session of its own to end; kill what is left of its group after some seconds."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience_s)
    if process.poll() is None:
        process.kill()
        process.wait()
    kill_group(process.pid)


@contextmanager
def _events_sent() -> Iterator[None]:
    """Let Prefect send its events while there is a server: at the end of the process each would wait for one."""
    from prefect.events.worker import EventsWorker

    try:
        yield
    finally:
        if not isinstance(sys.exc_info()[1], Stopped):  # after which nothing is sent at the end of the process
            EventsWorker.drain_all(timeout=_DRAIN_S)


def _listening(port: int) -> socket.socket:
    """Listen at a port of this machine, or at any when it is taken."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))


def wait_for(api: str, servers: Sequence[Server] = ()) -> None:
    """Wait until the server at this address answers.

    Args:
        api: it.
        servers: those that were started there so far, of which some may have died.

    Raises:
        TemperError: one after another died.
    """
    import httpx

    told = False
    while len(servers) <= _STARTS:
        try:
            if httpx.get(f"{api}/health", timeout=_ANSWERS_S).is_success:
                return
        except (httpx.ConnectError, httpx.TimeoutException):  # it is starting, or is to be started
            pass
        except httpx.HTTPError as error:
            if not told:
                print(f"waiting for {api}: {error}", flush=True)
            told = True
        time.sleep(_WAIT_S)
    raise TemperError("Prefect's server does not start", got=f"{_STARTS} that died", fix=f"look into .temper/{LOG}")


def _note_file(workspace: Path) -> Path:
    return workspace / ".temper" / "prefect-server.json"


def _note(workspace: Path, pid: int, api: str) -> None:
    import psutil

    about = {
        "pid": pid,
        "owner": os.getpid(),
        "begun": psutil.Process().create_time(),
        "api": api,
        "workspace": str(workspace.resolve()),  # a copy of the folder has the note, but not the server
    }
    atomic_write(_note_file(workspace), as_json(about))


def _noted(workspace: Path) -> str | None:
    """Return the address of this workspace's shared server, if the process that keeps it up is alive."""
    import psutil

    try:
        note: dict[str, Any] = json.loads(_note_file(workspace).read_text())
        if note["workspace"] != str(workspace.resolve()):
            return None
        owner = psutil.Process(note["owner"])
        alive = owner.create_time() == note["begun"] and owner.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return str(note["api"]) if alive else None
