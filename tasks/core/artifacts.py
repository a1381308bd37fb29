"""Outputs that appear whole or not at all, and inputs that are what they were when they were written.

A folder is written beside its place, synced, given a manifest with the digest of every file, and renamed; the
manifest is written last, so its existence means complete. Reading a folder checks it against its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from tasks.core.errors import BadData, BadModel

MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_folder(
    path: Path, about: dict[str, Any] | None = None, known: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error.

    Args:
        path: where the folder shall stand; what stood there stays until the new one is complete.
        about: what the manifest says beside the digests; may be filled while the block runs.
        known: digests of files that were taken as these were written, by relative path; may be filled likewise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    remove_staging(path)
    draft.mkdir()
    try:
        yield draft
        _write_manifest(draft, about or {}, known)
        old = path.with_name(f".{path.name}.draft-old-{os.getpid()}")
        if path.exists():
            path.rename(old)
        draft.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write one file so that a reader sees the old content or the new, never a part."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write that takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    remove_staging(path)
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove_staging(path: Path) -> None:
    """Remove what an earlier process left behind when it was killed while it wrote `path`."""
    for draft in path.parent.glob(f".{path.name}.draft-*"):
        if is_abandoned(draft):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def is_abandoned(draft: Path) -> bool:
    """Return whether the process that made a draft is gone; its number stands at the end of the draft's name."""
    import psutil

    writer = int(draft.name.rpartition("-")[2])
    return writer != os.getpid() and not psutil.pid_exists(writer)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder, after checking every file against it.

    Raises:
        BadData: the folder or its manifest is missing, or a file is missing, unexpected or altered.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        expected: dict[str, str] = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(
            "is not a complete output of temper",
            where=str(folder),
            got=str(error),
            expected=f"a folder with a {MANIFEST}",
            fix="run the stage that writes it",
        ) from error
    found = digests(folder)
    wrong = [
        f"{name}: {_difference(name, expected, found)}"
        for name in sorted(expected.keys() | found)
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise BadData(
            "was changed after it was written",
            where=str(folder),
            examples=wrong,
            fix="remove the folder; `dvc checkout` brings it back from the cache, or `temper run` makes it anew",
        )
    return manifest


def check_manifest(folder: Path) -> None:
    """Check a folder of whatever origin: against its manifest, where it has one.

    Raises:
        BadData: it has one and differs from it.
    """
    if (folder / MANIFEST).is_file():
        read_manifest(folder)


def digests(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Compute the SHA-256 of every file below a folder but its manifest, by relative path, sorted."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {name: known.get(name) or digest(folder / name) for name in names}


_digests: dict[tuple[str, int, int, int, int, int], str] = {}
"""Of files that this process has read, by algorithm, device, inode, size and the times of their last changes."""
_SETTLED_NS = 2 * 10**9
"""A file that changed less than so long ago could change again within one tick of the disk's clock, unseen."""


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Compute the hexadecimal digest of one file; the same process reads a file that has not changed once."""
    about = path.stat()
    key = (algorithm, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key in _digests:
        return _digests[key]
    found = _digest(path, algorithm)
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _SETTLED_NS:
        _digests[key] = found
    return found


def _digest(path: Path, algorithm: str) -> str:
    state = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def as_json(value: Any) -> str:
    """JSON that is the same for the same value, and readable."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model or an adapter.

    Raises:
        BadModel: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel("is not valid JSON", where=str(path), got=str(error)) from error
    if not isinstance(content, dict):
        raise BadModel("is not a JSON object", where=str(path), got=type(content).__name__)
    return content


def _write_manifest(folder: Path, about: dict[str, Any], known: Mapping[str, str]) -> None:
    files = {}
    for name, sha256 in digests(folder, known).items():
        _sync(folder / name)
        files[name] = {"sha256": sha256, "bytes": (folder / name).stat().st_size}
    for inner in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync(inner)
    atomic_write(folder / MANIFEST, as_json({**about, "files": files}))


def _difference(name: str, expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    if name not in found:
        return "is missing"
    if name not in expected:
        return "is not in the manifest"
    return f"sha256 {found[name][:12]}..., expected {expected[name][:12]}..."


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
