"""Rows in quarantine, looked at by a person: released, as they are or edited, into a source of their own.

    data/released/decisions.jsonl    every decision: the row as it was and as it is released, who, when and why
    data/released/rows/KIND.jsonl    the released rows, which `ingest` reads: the last decision on each row counts

The quarantine itself stays as `validate` wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from flows.files.convert import as_messages
from flows.run.lock import state_folder
from tasks.core.artifacts import atomic_write
from tasks.core.errors import BadData, BadParams
from tasks.core.parquet import read_records, read_rows
from tasks.core.records import (
    KINDS,
    ChatExample,
    LabelledReply,
    Message,
    PreferencePair,
    Record,
    SeqPair,
    TextExample,
)

QUARANTINE = Path("data", "quarantine")
RELEASED = Path("data", "released")
SOURCE = "released"
PARAMS = f"""\
ingest:
  sources:
    {SOURCE}: {{kind: folder, path: {RELEASED / "rows"}, glob: "*.jsonl"}}
validate:
  accepted: [{SOURCE}]"""
"""What params.yaml needs so that released rows are read, and not sent back for what they were looked at for."""

Action = Literal["release", "withdraw"]


class Decision(NamedTuple):
    """What a person decided on a row.

    Attributes:
        id: of the row.
        action: `release`, or `withdraw`, which takes an earlier release back.
        by: who.
        at: when, as ISO 8601 with the offset from UTC.
        why: their reason.
        kind: of the row.
        place: where it stands: file and line, or its id.
        reasons: why it is in quarantine.
        before: the row as it is there, in the form of a file of rows.
        row: as it is released.
    """

    id: str
    action: Action
    by: str
    at: str
    why: str
    kind: str
    place: str
    reasons: list[str]
    before: dict[str, Any]
    row: dict[str, Any]


class Quarantined(NamedTuple):
    """A row in quarantine, why it is there, and the last decision on it."""

    record: Record
    place: str
    reasons: list[str]
    decision: Decision | None

    @property
    def released(self) -> bool:
        """Whether it is among the released rows."""
        return self.decision is not None and self.decision.action == "release"


def quarantined(workspace: Path) -> list[Quarantined]:
    """List the rows in quarantine in their order; none where nothing was validated yet."""
    folder = workspace / QUARANTINE
    if not (folder / "reasons.parquet").is_file():
        return []
    why: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for row in read_rows(folder / "reasons.parquet"):
        why.setdefault(row["id"], []).append(row["reason"])
        places[row["id"]] = row["place"]
    last = {each.id: each for each in decisions(workspace)}
    return [
        Quarantined(record, places.get(record.id, record.id), why.get(record.id, []), last.get(record.id))
        for record in read_records(folder)
    ]


def find(workspace: Path, row_id: str) -> Quarantined:
    """Return a row in quarantine by its id.

    Raises:
        BadParams: there is none.
    """
    for row in quarantined(workspace):
        if row.record.id == row_id:
            return row
    raise BadParams(
        "no row in quarantine has this id", where=str(QUARANTINE), got=row_id, fix="`temper quarantine` lists them"
    )


def decisions(workspace: Path) -> Iterator[Decision]:
    """Yield all decisions, the oldest first."""
    file = workspace / RELEASED / "decisions.jsonl"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1):
        try:
            yield Decision(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise BadData("is no decision", where=f"{file}:{number}", got=str(error), fix="correct the line") from error


def decide(
    workspace: Path, row_id: str, action: Action, *, by: str, why: str, texts: Sequence[str] | None = None
) -> Decision:
    """Release a row in quarantine, or take its release back; both files are whole when this returns.

    Args:
        workspace: whose row it is.
        row_id: its id.
        action: the decision.
        by: who decides.
        why: their reason.
        texts: the row's texts as they are released, in the order of `texts_of`; None: as they are.

    Raises:
        BadParams: there is no such row, there are fewer or more texts, or nothing to withdraw.
        BadData: the earlier decisions cannot be read.
    """
    row = find(workspace, row_id)
    if action == "withdraw" and not row.released:
        raise BadParams("was not released", where=row_id)
    edited = row.record if texts is None else with_texts(row.record, texts)
    before, after = as_row(row.record), as_row(edited)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    made = Decision(row_id, action, by, at, why, row.record.kind, row.place, row.reasons, before, after)
    with FileLock(state_folder(workspace) / "released.lock"):
        told = [*decisions(workspace), made]
        (workspace / RELEASED / "rows").mkdir(parents=True, exist_ok=True)
        atomic_write(workspace / RELEASED / "decisions.jsonl", "".join(_line(each._asdict()) for each in told))
        last = {each.id: each for each in told}
        for kind in KINDS:
            released = [each.row for each in last.values() if each.kind == kind and each.action == "release"]
            file = workspace / RELEASED / "rows" / f"{kind}.jsonl"
            if released or file.is_file():
                atomic_write(file, "".join(map(_line, released)))
    return made


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def as_row(record: Record) -> dict[str, Any]:
    """Convert a row to the form of a line of a file, which `ingest` reads back as the same kind."""
    if isinstance(record, TextExample):
        return {"text": record.text}
    if isinstance(record, SeqPair):
        return {"input": record.input, "target": record.target}
    return dict(as_messages(record))


# --- the texts of a row, to be edited ---------------------------------------------------------------------------------


def texts_of(record: Record) -> list[tuple[str, str]]:
    """List the texts of a row, each with what it is: the role of a turn, or the column."""
    turns = [(message.role, message.content) for message in _turns(record)]
    return turns + [(name, getattr(record, name)) for name in _columns(record)]


def with_texts(record: Record, texts: Sequence[str]) -> Record:
    """Return a row with other texts, in the order of `texts_of`; all else of it stays.

    Raises:
        BadParams: there are fewer or more of them.
    """
    turns, columns = _turns(record), _columns(record)
    if len(texts) != len(turns) + len(columns):
        expected = f"{len(turns) + len(columns)} texts"
        raise BadParams("has another number of texts", where=record.id, got=str(len(texts)), expected=expected)
    said = tuple(turn._replace(content=text) for turn, text in zip(turns, texts, strict=False))
    changed: dict[str, Any] = dict(zip(columns, texts[len(turns) :], strict=True))
    if turns:
        changed["messages" if isinstance(record, ChatExample) else "prompt"] = said
    return replace(record, **changed)


def _turns(record: Record) -> tuple[Message, ...]:
    if isinstance(record, ChatExample):
        return record.messages
    return record.prompt if isinstance(record, PreferencePair | LabelledReply) else ()


def _columns(record: Record) -> tuple[str, ...]:
    names = {
        "preference": ("chosen", "rejected"),
        "labelled": ("reply",),
        "text": ("text",),
        "pair": ("input", "target"),
    }
    return names.get(record.kind, ())
