"""Endurance tests of the registry: concurrent writers, and kills at any moment.

    python -m bench.registry ledger     F16: 4 writers of 250 moves each, on SQLite and through an MLflow server
    python -m bench.registry register   F14: 100 kills while the same content is registered
    python -m bench.registry promote    F15: 100 kills while a version is promoted
    python -m bench.registry rollback   100 rollbacks, the weights compared byte by byte, and how long moves take

Each ends with exit 1 when something was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.clock import ROOT, machine
from bench.registered import made, model_and_sources, workspace_at
from tasks.core.errors import TemperError
from tasks.core.stage import quiet_libraries
from tasks.register.lineage import StagePaths

if TYPE_CHECKING:
    from mlflow import MlflowClient


# --- F16: several writers ---------------------------------------------------------------------------------------------


class Race(NamedTuple):
    """Outcome of several concurrent writers.

    Attributes:
        entries: how many moves the ledger holds.
        linear: whether they are numbered without a gap, each begins where the one before ended, and none is doubled.
        won: the moves that each writer made, by its own count.
        refused: how often a writer was refused because the alias had moved meanwhile.
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
    """Register a model with some versions that hold nothing."""
    client.create_registered_model(model)
    for _ in range(count):
        client.create_model_version(model, "s3://nowhere/model")


def race(uri: str, model: str, *, writers: int, each: int) -> Race:
    """Let several processes move the champion alias of one model, and return the outcome."""
    import mlflow

    from tasks.registry.alias_log import champion_of, moves
    from tasks.registry.names import CHAMPION

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
    """Run one writer: make its version champion, and where another one did so first, try again."""
    import mlflow

    from tasks.core.errors import AliasMoved
    from tasks.registry.alias_log import move_champion, moves

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
    """Run an MLflow server on this machine for as long as the block lasts; yield its address."""
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


# --- kills ------------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any], kill_after_s: float | None = None) -> Any:
    """Run work in a separate process that has all libraries loaded; return what it returns.

    Args:
        work: what is run.
        kill_after_s: when it is ended by kill -9; None for never.

    Returns:
        The result; KILLED when it was killed before it ended.
    """
    (reader, writer), began = os.pipe(), time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            try:
                json.dump({"result": work()}, pipe)
            except TemperError as error:
                json.dump({"error": error.what}, pipe)
            except BaseException:  # the child must not run on into the parent's code
                json.dump({"error": traceback.format_exc()}, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if kill_after_s is not None:
            ready, _, _ = select.select([pipe], [], [], kill_after_s)
            if not ready:
                os.kill(child, signal.SIGKILL)
        told = pipe.read()
    os.waitpid(child, 0)
    if not told:
        return KILLED
    found = json.loads(told)
    if "error" in found:
        raise RuntimeError(f"after {time.monotonic() - began:.1f} s: {found['error']}")
    return found["result"]


KILLED = "killed"


class Kills(NamedTuple):
    """Outcome of a series of kills.

    Attributes:
        kills: how many there were.
        wrong: what was found that must not be, a sentence each.
        seconds: how long it took.
    """

    kills: int
    wrong: list[str]
    seconds: float


def registration(workspace: Path, outputs: StagePaths, number: int) -> Callable[[], str]:
    """Build a function that registers a content and returns the version."""
    from tasks.register.stage import register

    named = model_and_sources(workspace)
    return lambda: str(register(workspace, "qlora", outputs, f"content {number}", *named).version)


def registrations(folder: Path, base: Path, kills: int, seed: int = 1, per_content: int = 10) -> Kills:
    """F14: kills while contents are registered, by one process or two at once; each is completed in the end."""
    random, began, wrong = Random(seed), time.monotonic(), list[str]()
    workspace = workspace_at(folder / "workspace")

    def timed(number: int) -> float:
        (folder / f"made-{number}").mkdir()
        outputs.append(made(folder / f"made-{number}", base, 100 + number))
        start = time.monotonic()
        in_child(registration(workspace, outputs[number], number))
        return time.monotonic() - start

    outputs: list[StagePaths] = []
    timed(0)  # the first makes the database
    whole_s, done, contents = timed(1), 0, 2
    while done < kills:
        (folder / f"made-{contents}").mkdir()
        outputs.append(made(folder / f"made-{contents}", base, 100 + contents))
        victim = registration(workspace, outputs[contents], contents)
        for _ in range(min(per_content, kills - done)):
            with ThreadPoolExecutor(1) as other:
                beside = other.submit(in_child, victim) if random.random() < 0.1 else None
                killed = in_child(victim, random.uniform(0, whole_s)) == KILLED
            done += killed
            if beside or not killed:  # it is complete
                break
        in_child(victim)
        contents += 1
    wrong += in_child(lambda: _wrong_versions(workspace, contents))
    return Kills(done, wrong, time.monotonic() - began)


def _wrong_versions(workspace: Path, contents: int) -> list[str]:
    """List the versions that are lost, doubled or torn, of contents that were all registered."""
    from flows.registry.evidence import broken, evidence
    from tasks.registry.client import KEY_TAG, connect
    from tasks.registry.versions import versions

    client = connect(workspace)
    found = versions(client, "temper-tiny")
    wrong = []
    for number in range(contents):
        same = [version for version in found if version.tags.get(KEY_TAG) == f"content {number}"]
        if len(same) != 1:
            wrong.append(f"content {number} has {len(same)} versions")
        wrong += [
            f"content {number}: version {version.version} is not whole"
            for version in same
            if not evidence(client, version).suites or broken(client, version)
        ]
    return wrong


class Moves(NamedTuple):
    """A workspace with three versions, of which 1 and 2 pass the gate against each other and 3 does not."""

    workspace: Path
    weights: dict[str, str]


def three_versions(folder: Path, base: Path) -> Moves:
    """Register three versions of the model."""
    from tasks.core.artifacts import digests

    workspace, weights = workspace_at(folder / "workspace"), {}
    for number, right in enumerate((150, 151, 20), 1):
        (folder / f"made-{number}").mkdir()
        outputs = made(folder / f"made-{number}", base, right)
        in_child(registration(workspace, outputs, number))
        weights[str(number)] = json.dumps(digests(outputs.model))
    return Moves(workspace, weights)


def promotions(folder: Path, base: Path, kills: int, seed: int = 1) -> Kills:
    """F15: kills while versions are promoted; the alias must name one that passed, and the next try completes it."""
    from flows.registry.promotion import promote

    random, began, wrong, done = Random(seed), time.monotonic(), list[str](), 0
    workspace = three_versions(folder, base).workspace

    def move(version: str) -> Callable[[], str]:
        return lambda: str(promote(workspace, version, "kills").champion)

    in_child(move("1"))
    start = time.monotonic()
    in_child(move("2"))
    whole_s, present = time.monotonic() - start, "2"
    while done < kills:
        version = random.choice(["1", "2", "3"])
        if in_child(move(version), random.uniform(0, whole_s)) != KILLED:
            continue
        done += 1
        alias = in_child(lambda: _alias(workspace))
        if alias not in ("1", "2"):
            wrong.append(f"after kill {done} the alias names version {alias}")
        present = version if version != "3" else present
        if version != "3" and (found := in_child(move(version))) != version:
            wrong.append(f"after kill {done} version {version} was not promoted, but {found}")
    wrong += in_child(lambda: _wrong_ledger(workspace))
    return Kills(done, wrong, time.monotonic() - began)


def _alias(workspace: Path) -> str:
    from tasks.registry.client import connect
    from tasks.registry.names import CHAMPION

    return str(connect(workspace).get_registered_model("temper-tiny").aliases.get(CHAMPION))


def _wrong_ledger(workspace: Path) -> list[str]:
    from tasks.registry.alias_log import champions, moves
    from tasks.registry.client import connect

    ledger = moves(connect(workspace), "temper-tiny")
    wrong = [f"entry {b.number} begins at {b.before}" for a, b in pairwise(ledger) if b.before != a.to]
    wrong += [f"entry {move.number} makes version 3 champion" for move in ledger if move.to == "3"]
    if champions(ledger)[-1] != _alias(workspace):
        wrong.append("alias and ledger disagree")
    return wrong


class Rollbacks(NamedTuple):
    """Outcome of a series of rollbacks.

    Attributes:
        rollbacks: how many there were.
        identical: after how many the champion's files were those that were registered, byte by byte.
        promote_s: seconds of each promotion.
        rollback_s: seconds of each rollback.
    """

    rollbacks: int
    identical: int
    promote_s: list[float]
    rollback_s: list[float]


def rollbacks(folder: Path, base: Path, count: int) -> Rollbacks:
    """Promote version 2 and roll back to 1, again and again, in one process; read the champion's files each time."""
    from flows.registry.promotion import promote, rollback
    from tasks.core.artifacts import digests
    from tasks.registry.client import connect
    from tasks.registry.versions import fetch_model, version_at

    workspace, weights = three_versions(folder, base)

    def work() -> dict[str, Any]:
        promote(workspace, "1", "")
        told: dict[str, Any] = {"identical": 0, "promote": [], "rollback": []}
        client = connect(workspace)
        for _ in range(count):
            start = time.perf_counter()
            promote(workspace, "2", "")
            told["promote"].append(time.perf_counter() - start)
            start = time.perf_counter()
            rollback(workspace)
            told["rollback"].append(time.perf_counter() - start)
            champion = fetch_model(client, version_at(client, "models:/temper-tiny@champion"))
            told["identical"] += json.dumps(digests(champion)) == weights["1"]
        return told

    told = in_child(work)
    return Rollbacks(count, told["identical"], told["promote"], told["rollback"])


# --- the command line -------------------------------------------------------------------------------------------------


def _warm() -> None:
    """Import what children need, so that a kill meets their work and not their imports."""
    import torch
    import transformers  # noqa: F401

    import tasks.register.stage
    import tasks.serving.chat_model  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[max(0, round(0.99 * len(seconds)) - 1)]


def main() -> None:
    """Run one of the tests and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ledger", "register", "promote", "rollback"])
    parser.add_argument("--count", type=int, help="moves of each writer, kills, or rollbacks")
    asked = parser.parse_args()
    quiet_libraries()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder, wrong = Path(name), list[str]()
        if asked.what == "ledger":
            each = asked.count or 250
            with serving(folder) as server:
                for kind, uri in (("SQLite", f"sqlite:///{folder / 'file.db'}"), ("server", server)):
                    found = race(uri, "raced", writers=4, each=each)
                    print(f"{kind}: {found}")
                    if found.entries != 4 * each or not found.linear or found.alias != found.champion:
                        wrong.append(f"{kind}: a move was lost")
        elif asked.what == "rollback":
            _warm()
            told = rollbacks(folder, ROOT / "models" / "tiny", asked.count or 100)
            for move, seconds in (("promote", told.promote_s), ("rollback", told.rollback_s)):
                print(f"{move}: median {statistics.median(seconds):.2f} s, p99 {_p99(seconds):.2f} s")
            print(f"{told.identical} of {told.rollbacks} rollbacks restored the same bytes")
            wrong += ["a rollback restored other bytes"] * (told.identical != told.rollbacks)
        else:
            _warm()
            kill = registrations if asked.what == "register" else promotions
            done = kill(folder, ROOT / "models" / "tiny", asked.count or 100)
            print(f"{done.kills} kills in {done.seconds:.0f} s: {len(done.wrong)} wrong")
            wrong += done.wrong
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
