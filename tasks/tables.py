"""Rows on disk: Parquet files, one per kind of row, with schemas fixed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.outputs import write_whole
from tasks.records import ChatExample, Message, PreferencePair, Record, TextExample

if TYPE_CHECKING:
    import pyarrow as pa

KINDS: dict[str, type[Record]] = {kind.kind: kind for kind in (ChatExample, PreferencePair, TextExample)}


def record_schema(kind: str) -> pa.Schema:
    """The columns of one kind of row."""
    import pyarrow as pa

    text = pa.string()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    own = {
        "chat": [("messages", messages), ("tools", pa.list_(text))],
        "preference": [("prompt", messages), ("chosen", text), ("rejected", text)],
        "text": [("text", text)],
    }[kind]
    return pa.schema([("id", text), ("source", text), ("family", text), ("group", text), *own])


def write_records(folder: Path, records: Iterable[Record]) -> dict[str, int]:
    """Writes `KIND.parquet` for every kind, in order and also when empty; returns the number of rows of each."""
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for record in records:
        by_kind[record.kind].append(_row(record))
    for kind, rows in by_kind.items():
        write_rows(folder / f"{kind}.parquet", rows, record_schema(kind))
    return {kind: len(rows) for kind, rows in by_kind.items()}


def read_records(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Record]:
    """The rows of a folder that `write_records` wrote."""
    for kind in kinds:
        for row in read_rows(folder / f"{kind}.parquet"):
            yield _record(kind, row)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as one Parquet file, whole; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    write_whole(path, buffer.getvalue().to_pybytes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
    return rows


def _row(record: Record) -> dict[str, Any]:
    row = asdict(record)
    for key in ("messages", "prompt"):
        if key in row:
            row[key] = [message._asdict() for message in getattr(record, key)]
    return row


def _record(kind: str, row: dict[str, Any]) -> Record:
    for key in ("messages", "prompt"):
        if key in row:
            row[key] = tuple(Message(**message) for message in row[key])
    if "tools" in row:
        row["tools"] = tuple(row["tools"])
    return KINDS[kind](**row)
