"""Promotions that wait for a person's word: each is noted in the workspace for as long as its process waits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from flows.run.lock import state_folder
from tasks.core.artifacts import as_json, atomic_write
from tasks.gate.checks import GateDecision

_FOLDER = "approvals"
_CLOCK_S = 5.0
"""By so much the time at which a process began may change, when the clock is set."""


class Waiting(NamedTuple):
    """A flow run that waits.

    Attributes:
        run: its id, which `temper approve` takes.
        model: the registered model's name.
        version: the version that passed the gate.
        summary: the verdict in a few words.
        since: when it began to wait, in seconds since 1970.
        pid: its process.
        begun: when that began, by which it is told from another of the same number.
    """

    run: str
    model: str
    version: str
    summary: str
    since: float
    pid: int
    begun: float


@contextmanager
def noted(workspace: Path, run: str, model: str, verdict: GateDecision) -> Iterator[None]:
    """Note that this process waits for a decision on a version, within this block."""
    folder = state_folder(workspace) / _FOLDER
    folder.mkdir(exist_ok=True)
    begun = psutil.Process().create_time()
    note = Waiting(run, model, verdict.version, verdict.summary(), time.time(), os.getpid(), begun)
    file = folder / f"{run}.json"
    atomic_write(file, as_json(note._asdict()))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def waiting(workspace: Path) -> list[Waiting]:
    """List the runs that wait, the oldest first; one whose process was killed waits no longer."""
    found = list[Waiting]()
    for file in (workspace / ".temper" / _FOLDER).glob("*.json"):
        try:
            note = Waiting(**json.loads(file.read_text()))
            alive = abs(psutil.Process(note.pid).create_time() - note.begun) < _CLOCK_S
        except (OSError, ValueError, psutil.Error):  # it ended meanwhile, or a kill left the note
            continue
        found += [note] if alive else []
    return sorted(found, key=lambda note: note.since)
