"""Holding a workspace: one run at a time, and who holds it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from tasks.core.artifacts import as_json, atomic_write
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
    file = state_folder(workspace) / name
    if file in _held:
        yield
        return
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _busy(workspace, file) from None
    try:
        holder = {"pid": os.getpid(), "purpose": purpose, "since": time.strftime("%H:%M:%S on %Y-%m-%d")}
        atomic_write(_holder_note(file), as_json(holder))
        _held.add(file)
        yield
    finally:
        _held.discard(file)
        lock.release()


class Holder(NamedTuple):
    """Who holds a workspace: its process, what it does, and since when."""

    pid: int
    purpose: str
    since: str


def holder(workspace: Path, name: str = "lock") -> Holder | None:
    """Tell who holds the workspace; does not touch the lock, as a run that begins at that moment would be refused."""
    import psutil

    file = workspace / ".temper" / name
    try:
        note = json.loads(_holder_note(file).read_text())
        return Holder(**note) if _is_locked(file) and psutil.pid_exists(note["pid"]) else None
    except (OSError, ValueError):  # nobody ever held it, or the note is of this moment
        return None


def _is_locked(file: Path) -> bool:
    """Look the file up among the kernel's locks, where the kernel tells of them; elsewhere take the note's word."""
    locks = Path("/proc/locks")
    if not locks.is_file():
        return True
    inode = f":{file.stat().st_ino}"
    return any("FLOCK" in line and line.split()[5].endswith(inode) for line in locks.read_text().splitlines())


def _holder_note(lock: Path) -> Path:
    """Name the file beside a lock that says who holds it, or who held it last."""
    return lock.with_name(f"{lock.name}.holder.json")


def _busy(workspace: Path, lock: Path) -> WorkspaceBusy:
    try:
        holder: dict[str, Any] = json.loads(_holder_note(lock).read_text())
    except (OSError, ValueError):
        holder = {"pid": "unknown", "purpose": "another run", "since": "a moment ago"}
    return WorkspaceBusy(
        f"{holder['purpose']} (process {holder['pid']}) holds the workspace since {holder['since']}",
        where=str(workspace),
        fix=f"wait for it, or stop it with: kill {holder['pid']}",
    )
