"""An engine as a process: found, started on a port of this machine, waited for until it answers, and ended."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import httpx

from flows.serve.engines.dialect import Dialect, Launch
from tasks.core.errors import BadModel, BadParams
from tasks.core.signals import kill_group
from tasks.core.stage import OWNER

_LOOK_S, _END_S, _ANSWERS_S = 0.1, 15.0, 5.0
_TAIL = 12


def program_of(dialect: Dialect, path: Path | None) -> Path:
    """Find an engine's executable: where `--engine-path` or its variable says, or on PATH.

    Raises:
        BadParams: it is not there; how to get it is said.
    """
    named = str(path) if path else os.environ.get(dialect.variable, "")
    found = shutil.which(named or dialect.program)
    if found is None:
        given = "--engine-path" if path else dialect.variable
        raise BadParams(
            "the engine is not there",
            where=f"--engine {dialect.name}",
            got=f"{given} is {named}, which is no program"
            if named
            else f"no {dialect.program} on PATH; neither --engine-path nor {dialect.variable} is given",
            expected="its program, in an environment of its own, as its versions cannot be those of temper's",
            fix="run\n" + "\n".join(dialect.install),
        )
    return Path(found)


class EngineProcess:
    """A running engine.

    Args:
        dialect: which one.
        launch: how it is started; its port is chosen here.
        scratch: a folder of its own, for its log; it is removed when this process is gone.

    Raises:
        BadModel: it ends, or does not answer in time; with the last lines that it said.
    """

    def __init__(self, dialect: Dialect, launch: Launch, scratch: Path) -> None:
        self._dialect, self._launch, self._log = dialect, launch, scratch / "engine.log"
        self.key = secrets.token_urlsafe(32)
        port = _free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = dialect.command(launch._replace(port=port))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.serve.engines.keeper", str(scratch), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **dialect.environment(self.key), OWNER: str(os.getpid())},
                start_new_session=True,
            )
        try:
            self._wait_for_answer()
        except BaseException:
            self.end()
            raise

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of a request to it."""
        return {"Authorization": f"Bearer {self.key}"}

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        return self._process.wait()

    def end(self) -> None:
        """Ask it to end, wait a while, and kill what is left of it and of what it started."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        kill_group(self._process.pid)
        self._process.wait()

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + self._dialect.start_s
        with httpx.Client(timeout=_ANSWERS_S, trust_env=False) as client:
            while not self._healthy(client):
                self._check_alive(deadline)
                time.sleep(_LOOK_S)

    def _healthy(self, client: httpx.Client) -> bool:
        try:
            return client.get(f"{self.address}/health", headers=self.headers).status_code == httpx.codes.OK
        except httpx.TransportError:  # it does not listen yet
            return False

    def _check_alive(self, deadline: float) -> None:
        code = self._process.poll()
        if code is None and time.monotonic() <= deadline:
            return
        why = f"no answer within {self._dialect.start_s:.0f} s" if code is None else f"exit code {code}"
        raise BadModel(
            f"{self._dialect.name} does not start on it",
            where=str(self._launch.model),
            got=f"{why}\n{self._said()}",
            fix="see what it says; --engine-option adds to its command line",
        )

    def _said(self) -> str:
        """Return the last lines of its log, which has no prompts yet."""
        with self._log.open("rb") as log:
            return _tail(log)


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - (1 << 14)))
    return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-_TAIL:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
