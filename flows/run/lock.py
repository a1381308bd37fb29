"""Holding a workspace: one run at a time, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.core.errors import WorkspaceBusy


def state_folder(workspace: Path) -> Path:
    """`.temper/`, where everything is that is neither versioned nor an output; made if need be, for this user alone."""
    folder = workspace / ".temper"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


_held: set[Path] = set()
"""The lock files that this process holds."""


@contextmanager
def held(workspace: Path, purpose: str, name: str = "lock") -> Iterator[None]:
    """Hold the workspace while the block runs; within a block that holds it already this does nothing.

    The kernel lets go of it when this process ends, however it ends.

    Args:
        workspace: what is held.
        purpose: what holds it, for the error message of another process.
        name: the lock file in `.temper/`; locks of different names do not exclude each other.

    Raises:
        WorkspaceBusy: another process holds it; the message names it.
    """
    lock = state_folder(workspace) / name
    if lock in _held:
        yield
        return
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(workspace, file.name) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "purpose": purpose, "since": time.strftime("%H:%M:%S on %Y-%m-%d")}))
        file.flush()
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def _busy(workspace: Path, lock: str) -> WorkspaceBusy:
    try:
        holder: dict[str, Any] = json.loads(Path(lock).read_text())
    except ValueError:
        holder = {"pid": "unknown", "purpose": "another run", "since": "a moment ago"}
    return WorkspaceBusy(
        f"{holder['purpose']} (process {holder['pid']}) holds the workspace since {holder['since']}",
        where=str(workspace),
        fix=f"wait for it, or stop it with: kill {holder['pid']}",
    )
