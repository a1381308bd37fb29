"""The last run of a workspace, and whether it still holds: then there is nothing to do, and no server to start.

A run with servers of its own that changes nothing has nothing to tell them. What it would say follows from a note that
the last one left, as long as all that the note was made from is what it was: params, graph, dvc.lock, registry, the
code of temper and the place of the workspace. Whether data or code of stages changed is for `dvc status` to say.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flows
import tasks
from flows.registry.promotion import Promotion
from flows.run.lock import state_folder
from flows.run.repair import put_in_order
from tasks.core import pipeline
from tasks.core.artifacts import as_json, atomic_write, digest
from tasks.orchestration.dvc_session import changed_stages
from tasks.orchestration.run_journal import StageResult
from tasks.registry.client import local_database


class RunReport(NamedTuple):
    """Outcome of every stage, and of the best method; `comparison` is the page that compares all models."""

    outcomes: list[StageResult]
    promotion: Promotion | None
    comparison: Path


def keep_report(workspace: Path, report: RunReport) -> None:
    """Note a run for the next one, unless its promotion would be judged again; then remove an earlier note."""
    file, promoted = _file(workspace), report.promotion
    made_of = _made_of(workspace)
    if made_of is None or (promoted and not (promoted.passed and promoted.champion)):
        file.unlink(missing_ok=True)
        return
    champion = {"model": promoted.model, "version": promoted.champion, "method": promoted.method} if promoted else None
    page = str(report.comparison.relative_to(workspace))
    atomic_write(file, as_json({"made_of": made_of, "champion": champion, "comparison": page}))


def unchanged_report(workspace: Path, promoting: bool) -> RunReport | None:
    """Return the report of a run that would find nothing changed; None where one has to look.

    What a kill left behind is put in order before DVC is asked; a run that has to look does that itself.

    Args:
        workspace: which.
        promoting: whether the best method would be promoted.

    Raises:
        TemperError: `dvc status` fails.
    """
    try:
        note = json.loads(_file(workspace).read_text())
        champion, page = note["champion"], workspace / note["comparison"]
    except (OSError, ValueError, KeyError):  # none, or one that was cut: a run writes another
        return None
    if note["made_of"] != _made_of(workspace) or not page.is_file() or (promoting and not champion):
        return None
    for done in put_in_order(workspace):
        print(done, file=sys.stderr, flush=True)
    keys = pipeline.recorded_keys(workspace)
    if changed_stages(workspace) or pipeline.load(workspace).keys() - keys.keys():
        return None
    promotion = None
    if promoting:
        said = ["it is champion already"]
        promotion = Promotion(champion["model"], champion["version"], champion["method"], False, True, said)
    return RunReport([StageResult(stage, "unchanged", 0.0, key) for stage, key in keys.items()], promotion, page)


def _file(workspace: Path) -> Path:
    return state_folder(workspace) / "last-run.json"


def _made_of(workspace: Path) -> dict[str, Any] | None:
    """Collect what the end of a run follows from, besides what DVC looks at; None where its registry is elsewhere."""
    registry = local_database(workspace)
    files = [workspace / name for name in (pipeline.PARAMS, pipeline.PIPELINE, pipeline.LOCK)]
    if registry is None or not all(file.is_file() for file in (*files, registry)):
        return None
    digests = {file.name: digest(file) for file in (*files, registry)}
    return {"place": str(workspace.resolve()), "files": digests, "code": _code()}


def _code() -> str:
    """Compute a digest of where temper's own code lies, how long it is and when it was last written."""
    folders = [Path(package.__file__ or "").parent for package in (flows, tasks)]
    code = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in _CODE]
    marks = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in code]
    return hashlib.sha256(repr(marks).encode()).hexdigest()


_CODE = frozenset((".py", ".jinja", ".css", ".js", ".svg"))
