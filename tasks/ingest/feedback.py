"""Snapshots of what people said of answers: which files one has, and under which conditions it was made.

A snapshot is a folder with a manifest, written whole or not at all. Its conditions stand in the manifest, and nothing
that changes by itself, such as the time: the same feedback is the same folder, and for DVC nothing has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.core.artifacts import MANIFEST, read_manifest
from tasks.core.errors import BadData
from tasks.ingest.params import FeedbackSource

FILES = {"chats": "chats.jsonl", "labels": "labels.jsonl", "preferences": "preferences.jsonl"}
"""The file of each kind of row; a snapshot without such rows has no such file."""


def conditions(source: FeedbackSource) -> dict[str, Any]:
    """Return what decides which rows are in a snapshot, as its manifest says it."""
    return {"rows": sorted(source.rows), "consent": dict(source.consent), "days": source.days}


def snapshot_files(source: FeedbackSource) -> list[Path]:
    """List the files of a source's snapshot, in the order of their names; none where nobody said anything.

    Raises:
        BadData: the folder is no snapshot, was changed by other hands, or was made under other conditions.
    """
    folder = Path(source.path)
    if not (folder / MANIFEST).is_file():
        raise BadData("is no snapshot of feedback", where=str(folder), fix="write it with: temper feedback")
    manifest = read_manifest(folder)
    found = {key: manifest.get(key) for key in conditions(source)}
    if found != conditions(source):
        raise BadData(
            "is a snapshot under other conditions",
            where=str(folder),
            got=str(found),
            expected=str(conditions(source)),
            fix="renew it with: temper feedback",
        )
    return [folder / name for name in sorted(manifest["files"])]
