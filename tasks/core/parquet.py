"""Rows on disk: Parquet files, one per kind of row, with schemas fixed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import atomic_write
from tasks.core.records import KINDS, Message, Record

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

REFUSED = "refused.parquet"
"""The rows of a source that are not what their format says: place, reason, excerpt."""

GROUP_ROWS, GROUP_CHARACTERS = 8192, 16 << 20
"""What is held in memory before it is written, at most."""


def record_schema(kind: str) -> pa.Schema:
    """Return the columns of one kind of row."""
    import pyarrow as pa

    text = pa.string()
    kinds = {"learn": pa.bool_()}
    messages = pa.list_(pa.struct([(name, kinds.get(name, text)) for name in Message._fields]))
    tools = ("tools", pa.list_(text))
    own = {
        "chat": [("messages", messages), tools],
        "preference": [("prompt", messages), ("chosen", text), ("rejected", text), tools],
        "labelled": [("prompt", messages), ("reply", text), ("label", pa.bool_()), tools],
        "text": [("text", text)],
        "pair": [("input", text), ("target", text)],
    }[kind]
    about = [("id", text), ("source", text), ("file", text), ("row", pa.int64()), ("family", text), ("group", text)]
    return pa.schema([*about, *own])


def text_schema(names: Sequence[str]) -> pa.Schema:
    """Build a schema of text columns."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in names])


def write_records(folder: Path, records: Iterable[Record]) -> dict[str, int]:
    """Write `KIND.parquet` for every kind, in order and also when empty, as the rows come.

    Args:
        folder: a draft of `whole_folder`, which syncs what is written.
        records: the rows; no more of them are held at a time than the two limits above say.

    Returns:
        The number of rows of each kind.
    """
    counts = dict.fromkeys(KINDS, 0)
    with ExitStack() as stack:
        tables = {
            kind: stack.enter_context(_Growing(folder / f"{kind}.parquet", record_schema(kind))) for kind in KINDS
        }
        for record in records:
            tables[record.kind].append(_row(record))
            counts[record.kind] += 1
    return counts


class _Growing:
    """A Parquet file that is written group by group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self._schema, self._rows, self._characters = schema, list[dict[str, Any]](), 0
        self._writer: pq.ParquetWriter = pq.ParquetWriter(path, schema, compression="zstd")

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        for value in row.values():
            if isinstance(value, str):
                self._characters += len(value)
            elif isinstance(value, list):
                self._characters += sum(len(message["content"]) for message in value)
        if len(self._rows) == GROUP_ROWS or self._characters > GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._characters = [], 0


def read_records(folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Record]:
    """Yield the rows of a folder that `write_records` wrote, some at a time."""
    import pyarrow.parquet as pq

    for kind in kinds:
        with pq.ParquetFile(folder / f"{kind}.parquet") as file:
            yield from _records(kind, file.iter_batches(batch_size=1024))


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file whole, as one table without gaps."""
    import pyarrow.parquet as pq

    return pq.read_table(path, partitioning=None)


def as_records(kind: str, table: pa.Table) -> Iterator[Record]:
    """Yield the rows of a table of one kind."""
    return _records(kind, table.to_batches(max_chunksize=1024))


def as_table(kind: str, records: Iterable[Record]) -> pa.Table:
    """Build a table of rows of one kind."""
    import pyarrow as pa

    return pa.Table.from_pylist([_row(record) for record in records], schema=record_schema(kind))


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file, whole; the same rows give the same bytes."""
    import pyarrow as pa

    write_table(path, pa.Table.from_pylist(list(rows), schema=schema))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as one Parquet file, whole; the same table gives the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    atomic_write(path, buffer.getvalue().to_pybytes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file."""
    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    return rows


def _row(record: Record) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    for key in ("messages", "prompt"):
        if key in row:
            row[key] = [message._asdict() for message in row[key]]
    return row


def _records(kind: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    for batch in batches:
        for row in batch.to_pylist():
            yield _record(kind, row)


def _record(kind: str, row: dict[str, Any]) -> Record:
    for key in ("messages", "prompt"):
        if key in row:
            row[key] = tuple(Message(**message) for message in row[key])
    if "tools" in row:
        row["tools"] = tuple(row["tools"])
    return KINDS[kind](**row)
