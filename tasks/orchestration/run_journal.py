"""The journal of runs: each stage's end and duration, kept for status and estimates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class StageResult(NamedTuple):
    """Outcome of a stage: `state` is completed (it ran), restored (from DVC's cache) or unchanged."""

    stage: str
    state: str
    seconds: float
    key: str


class Event(NamedTuple):
    """Event of a stage: `state` is running, completed, restored, unchanged or failed; `line` its latest output."""

    stage: str
    state: str
    line: str = ""


def journal_file(workspace: Path) -> Path:
    """Return the path of the journal of outcomes, one JSON object per line."""
    return workspace / ".temper" / "journal.jsonl"


def record(workspace: Path, outcome: StageResult) -> None:
    """Append an outcome to the journal."""
    line = json.dumps({**outcome._asdict(), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    with journal_file(workspace).open("a") as file:
        file.write(line + "\n")


def last_seconds(workspace: Path) -> dict[str, float]:
    """Return how long each stage took when it last really ran."""
    return {entry["stage"]: entry["seconds"] for entry in _completed(workspace)}


def seconds_by_key(workspace: Path) -> dict[str, float]:
    """Return how long the outputs of each content key took to make, where made here; of several times the last."""
    return {entry["key"]: entry["seconds"] for entry in _completed(workspace)}


def _completed(workspace: Path) -> Iterator[dict[str, Any]]:
    """Yield the journal's entries of stages that really ran."""
    path = journal_file(workspace)
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that was cut by a kill tells nothing
        if entry["state"] == "completed":
            yield entry
