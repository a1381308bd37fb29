"""Commands on any file or folder of rows, without a workspace: inspect, render, convert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core import pipeline
from tasks.core.errors import BadData, BadParams, in_one_line
from tasks.core.layout import CLONE
from tasks.core.records import KINDS, Record
from tasks.ingest.params import FileSource
from tasks.ingest.stage import Reading
from tasks.orchestration.params import Params, load_params
from tasks.readers.files import check_name, is_prose

if TYPE_CHECKING:
    import pyarrow as pa


QUICKSTART = CLONE / "recipes" / "quickstart.yaml"


class FileFound(NamedTuple):
    """One file that was looked into: its format and rows, or why it holds none."""

    path: str
    format: str
    rows: int
    refused: int
    error: str


def inspect(path: Path, against: Sequence[Path]) -> dict[str, Any]:
    """Report what a run would make of a file, or of all files of a folder.

    Args:
        path: the file or folder.
        against: files with the questions of benchmarks.

    Returns:
        `format`, `rows` (as the files hold them), `kinds`, and how many rows would be `rejected`, `repaired`, merged
        as `duplicates` and found as `contamination`; with `reasons`, `repairs` and `remarks` by name, `benchmarks`,
        and all `files`.

    Raises:
        BadData: the file holds no rows, or no file of the folder does.
    """
    from tasks.validate.cross_row_checks import questions_of
    from tasks.validate.decide import apply_checks
    from tasks.validate.feature_cache import FeatureCache

    params = nearest_params()
    remarks = Counter[str]()
    files, records, refused = look_into(path, remarks)
    found = {
        "path": str(path),
        "format": _named({file.path: file.format for file in files if file.format}),
        "rows": sum(file.rows for file in files),
        "kinds": dict(Counter(record.kind for record in records)),
        "files": [file._asdict() for file in files],
        "remarks": dict(remarks.most_common()),
    }
    reasons = Counter(error.what for error in refused)
    if not records:
        return {
            **found,
            "rejected": len(refused),
            "repaired": 0,
            "duplicates": 0,
            "contamination": 0,
            "reasons": dict(reasons),
        }
    benchmarks = {str(each): questions_of(_tables(Reading("", any_file(each)).records())) for each in against}
    with TemporaryDirectory() as docs:
        verdict = apply_checks(
            _tables(records), benchmarks, params.render.held_out, params.validate_, Path(docs), FeatureCache(None)
        )
    reasons += Counter(reason for why in verdict.reasons.values() for reason in why)
    return {
        **found,
        "rejected": len(refused) + len(verdict.reasons),
        "repaired": len({change.id for change in verdict.repaired}),
        "duplicates": len(verdict.marks.exact) + len(verdict.marks.near),
        "contamination": int((verdict.marks.contamination > 0).sum()),
        "reasons": dict(reasons.most_common()),
        "repairs": dict(Counter(change.check for change in verdict.repaired)),
        "warnings": {
            name: outcome.found
            for name, outcome in verdict.outcomes.items()
            if outcome.found and not outcome.rows and not name.endswith("duplicates")
        },
        "benchmarks": {name: leaks._asdict() for name, leaks in verdict.marks.benchmarks.items()},
    }


def look_into(path: Path, remarks: Counter[str]) -> tuple[list[FileFound], list[Record], list[BadData]]:
    """Read the files; return them, their rows, and why rows were refused; count what is to be said of the others."""
    files: list[FileFound] = []
    records: list[Record] = []
    refused: list[BadData] = []
    for file in _files(path):
        try:
            reading = Reading(str(file), any_file(file))
            found = list(reading.records())
            if reading.holds_nothing:
                raise reading.refused[0]
        except BadData as error:
            if path.is_file():
                raise
            files.append(FileFound(in_one_line(str(file)), "", 0, 0, error.line()))
            continue
        records += found
        refused += reading.refused
        remarks += reading.remarks
        files.append(FileFound(str(file), _named(reading.formats), reading.read, len(reading.refused), ""))
    if not records and not refused:
        raise BadData("no file here holds rows", where=str(path), examples=[file.error for file in files])
    return files, records, refused


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = sorted(file for file in found if not is_prose(file.name))
    if not files:
        raise BadData("holds no files", where=str(path), fix="name a file, or a folder of files")
    return files


def any_file(path: Path, max_refused: float = 1.0) -> FileSource:
    """Build the source of a file of rows, detected by its content; up to this share of malformed rows are left out.

    Raises:
        BadData: its name has control characters.
    """
    check_name(str(path))
    return FileSource(
        kind="file",
        path=str(path),
        use="train",
        licence="?",
        format="auto",
        encoding="utf-8",
        max_refused=max_refused,
        take="all",
    )


def _named(formats: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(formats.values())))


def nearest_params() -> Params:
    """Load the checks of the current workspace, or else those of the quickstart."""
    try:
        return load_params(pipeline.find_workspace(Path.cwd()) / pipeline.PARAMS)
    except BadParams:
        return load_params(QUICKSTART)


def _tables(records: Sequence[Record] | Iterator[Record]) -> dict[str, pa.Table]:
    from tasks.core.parquet import as_table

    rows = list(records)
    return {kind: as_table(kind, [row for row in rows if row.kind == kind]) for kind in KINDS}
