"""What people said, as sources of kind `feedback` have it: snapshots that are renewed by an act, never by themselves.

`temper feedback`, `temper run --feedback` and the runs of a schedule with `--on-feedback` renew them. DVC keeps each
snapshot (`PATH.dvc`), so that a commit brings back what was trained on; stages read the snapshots alone.

A run that renews them leaves a note while it lasts. One that a kill ended, with a snapshot that was not learnt from, is
found by it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.run.lock import held, state_folder
from tasks.core import pipeline
from tasks.core.artifacts import MANIFEST, atomic_write
from tasks.core.errors import BadParams, TemperError
from tasks.ingest.feedback import conditions
from tasks.ingest.params import FeedbackSource
from tasks.orchestration.dvc_session import child_environment
from tasks.orchestration.params import load_params

if TYPE_CHECKING:
    from sqlalchemy import URL

    from flows.serve.feedback import Choice, Found


class Renewed(NamedTuple):
    """What became of one source's snapshot.

    Attributes:
        source: the key of `ingest.sources`.
        path: the folder.
        new: rows that the snapshot before did not have.
        forgotten: conversations that were deleted from the record.
    """

    source: str
    path: str
    found: Found
    new: int
    forgotten: int

    def lines(self) -> Iterator[str]:
        """Yield what happened, as sentences."""
        if self.forgotten:
            yield f"{self.source}: {self.forgotten} conversations deleted from the record"
        rows = ", ".join(f"{count} in {name}" for name, count in self.found.counts().items()) or "no rows"
        yield f"{self.source}: {rows}; {self.new} are new in {self.path}"
        for reason, count in sorted(self.found.left_out.items()):
            yield f"{self.source}: left out, {reason}: {count}"


def feedback_sources(workspace: Path) -> dict[str, FeedbackSource]:
    """Return the sources of feedback that params.yaml names.

    Raises:
        BadParams: there are none, or params.yaml is wrong.
    """
    sources = load_params(workspace / pipeline.PARAMS).ingest.sources
    found = {name: source for name, source in sources.items() if isinstance(source, FeedbackSource)}
    if not found:
        raise BadParams(
            "names no source of feedback",
            where=pipeline.PARAMS,
            expected="one of kind feedback below ingest.sources",
            fix="add said: {kind: feedback, path: data/feedback, record: said.db}; docs/serving.md has more",
        )
    return found


def renew(workspace: Path) -> list[Renewed]:
    """Bring the snapshots of all sources of feedback up to date, after deleting what is to be forgotten.

    Raises:
        BadParams: there is no such source, or no record.
        WorkspaceBusy: a run is reading them.
        Transient: a record does not answer.
    """
    with held(workspace, "temper feedback"):
        return [_renew(workspace, name, source) for name, source in feedback_sources(workspace).items()]


def records(workspace: Path) -> list[URL]:
    """Return where the records of all sources of feedback are, each once.

    Raises:
        BadParams: there is no such source, or none is named.
    """
    return list(dict.fromkeys(_place(workspace, source) for source in feedback_sources(workspace).values()))


def waiting(workspace: Path) -> int:
    """Count the rows that the records have and the snapshots have not."""
    from flows.serve.feedback import find
    from flows.serve.record import open_record

    count = 0
    for source in feedback_sources(workspace).values():
        with closing(open_record(_place(workspace, source))) as record:
            count += find(record, _choice(source)).new(workspace / source.path)
    return count


def state(workspace: Path) -> list[tuple[int, int]]:
    """Return what `waiting` follows from: as long as it stays the same, nothing was said and nothing was renewed."""
    from flows.serve.record import open_record

    found = []
    for source in feedback_sources(workspace).values():
        manifest = workspace / source.path / MANIFEST
        with closing(open_record(_place(workspace, source))) as record:
            found.append((record.newest(), manifest.stat().st_mtime_ns if manifest.is_file() else 0))
    return found


@contextmanager
def renewed(workspace: Path) -> Iterator[list[Renewed]]:
    """Renew the snapshots for the run in the block, and leave a note until it has ended by itself, well or badly."""
    note = _note(workspace)
    atomic_write(note, "a run that learns from new feedback has begun\n")
    try:
        yield renew(workspace)
    except Exception:
        note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def was_cut_short(workspace: Path) -> bool:
    """Return whether a run that learnt from new feedback has begun and not come to its end; nobody may hold it now."""
    return _note(workspace).is_file()


def _note(workspace: Path) -> Path:
    return state_folder(workspace) / "feedback-run"


def _renew(workspace: Path, name: str, source: FeedbackSource) -> Renewed:
    from flows.serve.feedback import find, forget, write
    from flows.serve.record import open_record

    place, folder = _place(workspace, source), workspace / source.path
    forgotten = forget(place, source.forget_after) if source.forget_after else 0
    with closing(open_record(place)) as record:
        found = find(record, _choice(source))
    new = found.new(folder)
    write(found, folder, conditions(source))
    _keep(workspace, folder)
    return Renewed(name, source.path, found, new, forgotten)


def _choice(source: FeedbackSource) -> Choice:
    from flows.serve.feedback import Choice

    return Choice(source.days, source.consent, source.rows)


def _place(workspace: Path, source: FeedbackSource) -> URL:
    from flows.serve.record_database import VARIABLE, url_given, url_of

    if source.record and "://" not in source.record:
        return url_of(workspace / source.record)
    if place := url_given(source.record):
        return place
    raise BadParams(
        "does not say where the record is",
        where="ingest.sources",
        expected=f"a file in `record`, or the variable {VARIABLE}",
    )


def _keep(workspace: Path, folder: Path) -> None:
    """Let DVC keep a snapshot that lies in the workspace, unless it has this one already.

    Raises:
        TemperError: DVC cannot.
    """
    if not folder.resolve().is_relative_to(workspace.resolve()) or _kept(folder) == pipeline.dvc_hash(folder):
        return
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "add", "--quiet", str(folder)]
    done = subprocess.run(command, cwd=workspace, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise TemperError("DVC does not keep it", where=str(folder), got=(done.stderr or done.stdout).strip())


def _kept(folder: Path) -> str:
    """Return DVC's hash of the snapshot that it has; empty without one."""
    from ruamel.yaml import YAML

    file = folder.with_name(f"{folder.name}.dvc")
    if not file.is_file():
        return ""
    said: dict[str, Any] = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    return str(said["outs"][0]["md5"])
