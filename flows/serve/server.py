"""The process of `temper serve`: its socket, its models and how it ends.

A signal ends it as it ends every command (`flows/run/ending.py`): the main thread waits for one, uvicorn runs aside. No
new connection is taken then, and what is being answered has `DRAIN_S` to come to its end.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import uvicorn
from fastapi import FastAPI
from sqlalchemy import URL

from flows.run.ending import aside
from flows.serve.app import make_app
from flows.serve.exchange import Service
from flows.serve.keys import Gatekeeper, Key, check_host
from flows.serve.metrics import Metrics
from flows.serve.record import Record, open_record
from flows.serve.routing import Models, Plan
from tasks.core.errors import BadParams

MAX_BODY_BYTES = 4 << 20
"""Of a request; a prompt of a million tokens has about so many."""

DRAIN_S = 30
"""So long an answer may still take when the server is told to end, as stages may (`tasks/orchestration`)."""

_MARGIN_S = 5.0


class Options(NamedTuple):
    """How a server is reached, and what it keeps."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[Key] = ()
    record: URL | Path | None = None
    time_limit_s: float = 600.0


def say(line: str) -> None:
    """Print a line about the server, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


Pages: TypeAlias = Callable[[FastAPI, Service], str]
"""Puts pages beside the API on an app; returns their path."""


def serve(plan: Plan, workspace: Path | None, options: Options, pages: Pages | None = None) -> None:
    """Serve models, and pages beside them, until a signal ends it.

    Raises:
        BadParams: other machines would reach it without keys, or the port is taken.
        BadInput: a model cannot be used.
        RegistryUnreachable: MLflow does not answer.
    """
    check_host(options.host, options.keys)
    listener = listen(options.host, options.port)
    models = Models(plan, workspace, say)
    record = open_record(options.record, write=True) if options.record else None
    service = make_service(models, options, record)
    address = _address(listener)
    app = make_app(service)
    served = [f"serving {', '.join(models.names())} at {address}/v1"] if models.names() else []
    served += [f"pages at {address}{pages(app, service)}"] if pages else []
    server = Server(app, lambda: say(f"{', '.join(served)}; stop it with Ctrl-C"))
    ended = threading.Event()

    def work() -> None:
        try:
            models.begin()
            if options.record and workspace:
                _watch_drift(workspace, options.record, service.metrics)
            server.run([listener])
        finally:
            models.close(finish=True)
            if record:
                record.close()
            ended.set()

    def stop(_: object) -> None:
        server.should_exit = True
        if server.started:  # else a model is being loaded, of which nobody waits for anything
            ended.wait(DRAIN_S + _MARGIN_S)

    aside(work, stop=stop)


def _watch_drift(workspace: Path, place: URL | Path, metrics: Metrics) -> None:
    """Keep figures of drift, where there is a profile of what was trained on."""
    from flows.run.data_page import NUMBERS
    from flows.serve.drift import watch_drift
    from flows.serve.record_database import url_of

    if (workspace / NUMBERS).is_file():
        watch_drift(workspace, url_of(place), lambda found: metrics.tell_drift(found.columns), say)


def make_service(models: Models, options: Options, record: Record | None = None) -> Service:
    """Build what the requests of a server share."""
    return Service(
        models=models,
        gate=Gatekeeper(options.keys),
        record=record,
        metrics=Metrics(lambda: [(name, each.fingerprint, each.engine.state()) for name, each in models.versions()]),
        say=say,
        time_limit_s=options.time_limit_s,
        max_body_bytes=MAX_BODY_BYTES,
        unseen=set(),
    )


class Server(uvicorn.Server):
    """An app on a socket.

    Args:
        app: what answers.
        announce: is called when it listens.
    """

    def __init__(self, app: FastAPI, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._announce()


def listen(host: str, port: int) -> socket.socket:
    """Bind an address, before a model is loaded, which takes longer.

    Raises:
        BadParams: it is taken, or none of this machine's.
    """
    # with its protocol named: only then does asyncio switch Nagle's algorithm off, which holds a token back for 40 ms
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise BadParams(
            "cannot be listened on",
            where=f"--host {host} --port {port}",
            got=str(error),
            fix="choose another --port; 0 takes one that is free",
        ) from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
