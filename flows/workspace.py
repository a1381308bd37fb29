"""Holding a workspace: one run at a time, and everything in order before it begins.

What a kill may have left behind, and what is done about it:

- a torn DVC `rwlock`: removed, since nobody who wrote it is alive while this run holds the workspace;
- a torn `dvc.lock`: the last good copy is put back, and DVC's run cache restores what was made since;
- drafts of outputs: removed;
- an object in DVC's cache that is not what its name says: made anew from the output, or removed; DVC would serve it.

Checkpoints of trainings that were completed are removed besides.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks import graph
from tasks.checkpoints import checkpoint_folder
from tasks.errors import WorkspaceBusy
from tasks.outputs import as_json, digest, is_abandoned, write_whole


def state_folder(workspace: Path) -> Path:
    """`.temper/`, where everything is that is neither versioned nor an output; made if need be, for this user alone."""
    folder = workspace / ".temper"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


_held: set[Path] = set()
"""The lock files that this process holds."""


@contextmanager
def held(workspace: Path, purpose: str, name: str = "lock") -> Iterator[None]:
    """Holds the workspace while the block runs; within a block that holds it already this does nothing.

    The kernel lets go of it when this process ends, however it ends.

    Args:
        workspace: what is held.
        purpose: what another process is told that holds it.
        name: the lock file in `.temper/`; locks of different names do not exclude each other.

    Raises:
        WorkspaceBusy: another process holds it; says which.
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


def put_in_order(workspace: Path) -> list[str]:
    """Mends what a kill may have left behind; returns a sentence for everything that was done."""
    _forget_checkpoints(workspace)  # no damage: a training that is complete needs them no more
    return [
        *_mend_rwlock(workspace),
        *_mend_lock(workspace),
        *_remove_drafts(workspace),
        *_check_cache(workspace),
    ]


def keep_lock_copy(workspace: Path) -> None:
    """Keeps a copy of dvc.lock, which DVC rewrites in place, for the day that it is cut in the middle."""
    text = graph.read_lock(workspace)
    if _is_whole(text):
        write_whole(state_folder(workspace) / "dvc.lock.good", text)


def _mend_rwlock(workspace: Path) -> Iterator[str]:
    rwlock = workspace / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file():
        try:
            json.loads(rwlock.read_text())
        except ValueError:
            rwlock.unlink()
            yield f"removed {rwlock.relative_to(workspace)}, which was cut in the middle"


def _mend_lock(workspace: Path) -> Iterator[str]:
    lock, good = workspace / graph.LOCK, state_folder(workspace) / "dvc.lock.good"
    if not lock.is_file() or _is_whole(graph.read_lock(workspace)):
        return
    if good.is_file() and _is_whole(good.read_text()):
        write_whole(lock, good.read_bytes())
        yield "put back the last good copy of dvc.lock, which was cut in the middle"
    else:
        lock.unlink()
        yield "removed dvc.lock, which was cut in the middle; its stages are restored from DVC's cache"


def _is_whole(text: str) -> bool:
    """Whether dvc.lock has all that DVC writes for a stage; DVC itself accepts one that is cut between two keys."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(text)
        stages = content["stages"]
        return (
            content["schema"] == "2.0"
            and text.endswith("\n")
            and all("cmd" in s and s.get("outs") and all(_complete(o) for o in s["outs"]) for s in stages.values())
        )
    except (YAMLError, KeyError, TypeError, AttributeError):
        return False


def _complete(out: dict[str, Any]) -> bool:
    return {"path", "hash", "md5", "size"} <= out.keys()


def _remove_drafts(workspace: Path) -> Iterator[str]:
    for draft in sorted((workspace / "data").rglob(".*.draft-*")) + sorted((workspace / ".temper").rglob(".*.draft-*")):
        if draft.exists() and is_abandoned(draft):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
            yield f"removed the unfinished {draft.relative_to(workspace)}"


def _check_cache(workspace: Path) -> Iterator[str]:
    """Hashes cache objects that are new or were touched since they were last found right."""
    seen_file = state_folder(workspace) / "cache-checked.json"
    try:
        seen: dict[str, list[int]] = json.loads(seen_file.read_text())
    except (OSError, ValueError):
        seen = {}
    checked = {}
    cache = workspace / ".dvc" / "cache" / "files" / "md5"
    for path in sorted(cache.glob("??/*")):
        name = path.parent.name + path.name
        if seen.get(name) != _mark(path) and digest(path, "md5") != name.removesuffix(".dir"):
            if not _mend_object(workspace, path, name):
                yield f"removed a damaged object from DVC's cache: {name}"
                continue
            yield f"mended a damaged object of DVC's cache from the output that it was made of: {name}"
        checked[name] = _mark(path)
    if checked != seen:
        write_whole(seen_file, as_json(checked))


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _mend_object(workspace: Path, path: Path, name: str) -> bool:
    """Puts the right content in the place of a damaged cache object, if an output still has it; else removes it."""
    path.chmod(0o600)
    path.unlink()
    for output, md5 in graph.recorded_files(workspace):
        if md5 == name and output.is_file() and digest(output, "md5") == name:
            write_whole(path, output.read_bytes())
            path.chmod(0o444)
            return True
    return False


def _forget_checkpoints(workspace: Path) -> None:
    folder = checkpoint_folder(workspace, "")
    leftover = sorted(folder.iterdir()) if folder.is_dir() else []
    done = set(graph.recorded_keys(workspace).values()) if leftover else set()
    for path in leftover:
        if path.name in done:
            shutil.rmtree(path)
