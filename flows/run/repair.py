"""Holding a workspace: one run at a time, and everything in order before it begins.

What a kill may have left behind, and what is done about it:

- a torn DVC `rwlock`: removed, since nobody who wrote it is alive while this run holds the workspace;
- a torn `dvc.lock`: the last good copy is put back, and DVC's run cache restores what was made since;
- drafts of outputs: removed;
- an object in DVC's cache that is not what its name says: made anew from the output, or removed; DVC would serve it.

Checkpoints of trainings that were completed are removed besides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.run.lock import state_folder
from tasks.core import pipeline
from tasks.core.artifacts import as_json, atomic_write, digest, is_abandoned
from tasks.engine.checkpoints import checkpoint_folder


def put_in_order(workspace: Path) -> list[str]:
    """Repair what a kill may have left behind; return a sentence for everything that was done."""
    _forget_checkpoints(workspace)  # no damage: a training that is complete needs them no more
    return [
        *_mend_rwlock(workspace),
        *_mend_lock(workspace),
        *_remove_drafts(workspace),
        *_check_cache(workspace),
    ]


def keep_lock_copy(workspace: Path) -> None:
    """Keep a copy of dvc.lock, which DVC rewrites in place, in case it is cut in the middle."""
    text = pipeline.read_lock(workspace)
    if _is_whole(text):
        atomic_write(state_folder(workspace) / "dvc.lock.good", text)


def _mend_rwlock(workspace: Path) -> Iterator[str]:
    rwlock = workspace / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file():
        try:
            json.loads(rwlock.read_text())
        except ValueError:
            rwlock.unlink()
            yield f"removed {rwlock.relative_to(workspace)}, which was cut in the middle"


def _mend_lock(workspace: Path) -> Iterator[str]:
    lock, good = workspace / pipeline.LOCK, state_folder(workspace) / "dvc.lock.good"
    if not lock.is_file() or _is_whole(pipeline.read_lock(workspace)):
        return
    if good.is_file() and _is_whole(good.read_text()):
        atomic_write(lock, good.read_bytes())
        yield "put back the last good copy of dvc.lock, which was cut in the middle"
    else:
        lock.unlink()
        yield "removed dvc.lock, which was cut in the middle; its stages are restored from DVC's cache"


def _is_whole(text: str) -> bool:
    """Check that dvc.lock has all that DVC writes for a stage; DVC itself accepts one that is cut between two keys."""
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
    """Hash cache objects that are new or were touched since they were last found right."""
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
        atomic_write(seen_file, as_json(checked))


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _mend_object(workspace: Path, path: Path, name: str) -> bool:
    """Replace a damaged cache object by the right content, if an output still has it; else remove the object."""
    path.chmod(0o600)
    path.unlink()
    for output, md5 in pipeline.recorded_files(workspace):
        if md5 == name and output.is_file() and digest(output, "md5") == name:
            atomic_write(path, output.read_bytes())
            path.chmod(0o444)
            return True
    return False


def _forget_checkpoints(workspace: Path) -> None:
    folder = checkpoint_folder(workspace, "")
    leftover = sorted(folder.iterdir()) if folder.is_dir() else []
    done = set(pipeline.recorded_keys(workspace).values()) if leftover else set()
    for path in leftover:
        if path.name in done:
            shutil.rmtree(path)
