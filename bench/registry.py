"""What the registry withstands: writers at once, and kills at any moment.

    python -m bench.registry ledger     F16: 4 writers of 250 moves each, on SQLite and through an MLflow server
    python -m bench.registry register   F14: 100 kills while the same content is registered
    python -m bench.registry promote    F15: 100 kills while a version is promoted
    python -m bench.registry rollback   100 rollbacks, the weights compared byte by byte, and how long moves take

Each ends with exit 1 when something was lost, doubled or wrong.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient


# --- F16: several writers ---------------------------------------------------------------------------------------------


class Race(NamedTuple):
    """What came of several writers.

    Attributes:
        entries: how many moves the ledger holds.
        linear: whether they are numbered without a gap, each begins where the one before ended, and none is doubled.
        won: the moves that each writer made, by its own count.
        refused: how often a writer was told that the alias had moved meanwhile.
        alias: the version that the alias names in the end.
        champion: the version that the ledger names in the end.
        seconds: how long it took.
    """

    entries: int
    linear: bool
    won: list[int]
    refused: int
    alias: str
    champion: str
    seconds: float


def add_versions(client: MlflowClient, model: str, count: int) -> None:
    """Registers a model with some versions that hold nothing."""
    client.create_registered_model(model)
    for _ in range(count):
        client.create_model_version(model, "s3://nowhere/model")


def race(uri: str, model: str, *, writers: int, each: int) -> Race:
    """Lets several processes move the champion alias of one model, and reads what came of it."""
    import mlflow

    from tasks.ledger import champion_of, moves
    from tasks.names import CHAMPION

    client = mlflow.MlflowClient(uri)
    add_versions(client, model, writers)
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[tuple[int, int, int]] = context.Queue()
    began = time.monotonic()
    processes = [context.Process(target=_write, args=(uri, model, number, each, told)) for number in range(writers)]
    for process in processes:
        process.start()
    results = sorted(told.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    seconds = time.monotonic() - began
    ledger = moves(client, model)
    follows = all(after.before == before.to for before, after in pairwise(ledger))
    marks = {move.mark for move in ledger}
    linear = follows and len(marks) == len(ledger) and [m.number for m in ledger] == list(range(1, len(ledger) + 1))
    alias = str(client.get_registered_model(model).aliases[CHAMPION])
    refused = sum(lost for _, _, lost in results)
    won = [count for _, count, _ in results]
    return Race(len(ledger), linear, won, refused, alias, str(champion_of(client, model)), seconds)


def _write(uri: str, model: str, number: int, each: int, told: multiprocessing.Queue[tuple[int, int, int]]) -> None:
    """One writer: makes its version champion, and where another one did so first, tries again."""
    import mlflow

    from tasks.errors import AliasMoved
    from tasks.ledger import move_champion, moves

    client = mlflow.MlflowClient(uri)
    won = lost = 0
    while won < each:
        try:
            move_champion(client, model, moves(client, model), "promote", str(number + 1), reason=f"{number}:{won}")
            won += 1
        except AliasMoved:
            lost += 1
    told.put((number, won, lost))


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """An MLflow server on this machine for as long as the block lasts; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _await(port, server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=60)


def _await(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server does not answer")
