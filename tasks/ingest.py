"""Reads one source and writes its rows, typed.

Reads:  one entry of `ingest.sources`: a file of rows, or the generator's lexicon.
Writes: data/raw/SOURCE/: chat.parquet, preference.parquet, text.parquet, manifest.json (source, sha256, rows, licence).
Params: ingest.sources.SOURCE
Fails:  a source that cannot be read or is not what it says (65, never retried).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks import process
from tasks.errors import BadData
from tasks.generate import Recipe, generate, read_lexicon
from tasks.outputs import digest, whole_folder
from tasks.params import FileSource, GeneratorSource, Source
from tasks.records import ChatExample, Message, Record
from tasks.tables import write_records

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_source(name: str, source: Source) -> Iterator[Record]:
    """The rows of one source, in its own order.

    Raises:
        BadData: the source is missing, empty, not of a known format, or a row of it is malformed.
    """
    if isinstance(source, GeneratorSource):
        recipe = Recipe(name, source.rows, source.count, source.seed, source.withheld)
        return generate(recipe, read_lexicon(Path(source.path)))
    return _read_file(name, source)


def _read_file(name: str, source: FileSource) -> Iterator[Record]:
    path = Path(source.path)
    if not path.is_file():
        raise BadData(
            "there is no such file", where=str(path), fix=f"correct ingest.sources.{name}.path in params.yaml"
        )
    if path.stat().st_size == 0:
        raise BadData("is empty (0 bytes)", where=str(path), expected="at least one row", fix="fetch the file again")
    readers = {".json": read_json, ".jsonl": read_jsonl, ".parquet": read_parquet}
    if path.suffix not in readers:
        raise BadData(
            "unknown kind of file", where=str(path), got=path.suffix or "no ending", expected=", ".join(readers)
        )
    found = False
    for place, row in readers[path.suffix](path):
        found = True
        yield parse_row(f"{name}-{place.rpartition(':')[2]}", name, row, source.format, place)
    if not found:
        raise BadData("holds no rows", where=str(path), expected="at least one row", fix="fetch the file again")


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array, each with its place (`file:row`, from 1)."""
    rows = _parse_json(_read_text(path), str(path), first_line=1)
    if not isinstance(rows, list):
        raise BadData(
            "is not an array of rows", where=str(path), got=type(rows).__name__, expected="a JSON array of objects"
        )
    return ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file with one JSON value per line, each with its place (`file:line`, from 1)."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_json(line, str(path), first_line=number)


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, each with its place (`file:row`, from 1)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise BadData(
            "is not a whole Parquet file", where=str(path), got=str(error).split("\n")[0], fix="fetch the file again"
        ) from error


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(
            "is not UTF-8",
            where=f"{path}:{line}",
            got=f"byte 0x{content[error.start]:02X}",
            fix="convert it with iconv",
        ) from error


def _parse_json(text: str, path: str, first_line: int) -> Any:
    def refuse(constant: str) -> None:
        raise BadData(f"{constant} is not valid JSON", where=path, fix="write null or a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise BadData(
            "is cut off; was the download complete?" if cut else f"is not valid JSON: {error.msg}",
            where=f"{path}:{first_line + error.lineno - 1}:{error.colno}",
            got=repr(text[max(0, error.pos - 20) : error.pos + 20]),
            expected="JSON",
        ) from error
    except ValueError as error:
        raise BadData("holds a number that is too long", where=f"{path}:{first_line}", got=str(error)) from error
    except RecursionError as error:
        raise BadData("is nested too deeply", where=f"{path}:{first_line}", expected="rows of a few levels") from error


# --- formats: from a row of the file to one of ours -------------------------------------------------------------------


def parse_row(row_id: str, source: str, row: Any, form: str, place: str) -> ChatExample:
    """One row of a file as a chat.

    Args:
        row_id: the id that the chat gets.
        source: the key of `ingest.sources`.
        row: what the file holds there.
        form: `alpaca`, `conversations`, or `auto` to tell by the row's keys.
        place: `file:row`, for errors.

    Raises:
        BadData: the row is not of that format.
    """
    if not isinstance(row, Mapping):
        raise BadData("is not an object", where=place, got=type(row).__name__, expected="an object with named fields")
    chosen = _detect(row, place) if form == "auto" else form
    return ChatExample(id=row_id, source=source, messages=tuple(FORMATS[chosen](row, place)))


def _detect(row: Mapping[str, Any], place: str) -> str:
    if "conversations" in row:
        return "conversations"
    if "instruction" in row and "output" in row:
        return "alpaca"
    raise BadData(
        "is of no known format",
        where=place,
        got=f"the fields {', '.join(sorted(row)) or '(none)'}",
        expected="conversations, or instruction and output",
        fix="say ingest.sources.NAME.format, or rename the fields",
    )


def parse_alpaca(row: Mapping[str, Any], place: str) -> Iterable[Message]:
    """`instruction`, `input` (may be absent) and `output`."""
    instruction, output = _text(row, "instruction", place), _text(row, "output", place)
    context = _text(row, "input", place) if row.get("input") is not None else ""
    return Message("user", f"{instruction}\n{context}" if context else instruction), Message("assistant", output)


def parse_conversations(row: Mapping[str, Any], place: str) -> Iterable[Message]:
    """`conversations`: a list of `{from, value}`."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadData("has no conversation", where=place, got=repr(turns)[:60], expected="a list of {from, value}")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{place} conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise BadData("is not a turn", where=where, got=repr(turn)[:60], expected="{from, value}")
        role = _text(turn, "from", where)
        if role not in ROLES:
            raise BadData("has an unknown role", where=where, got=repr(role), expected=", ".join(ROLES))
        messages.append(Message(ROLES[role], _text(turn, "value", where)))
    return messages


def _text(row: Mapping[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        got = "nothing" if field not in row else type(value).__name__
        raise BadData(f'field "{field}" is not text', where=place, got=got, expected="a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadData(
            f'field "{field}" holds half a character (a lone surrogate)',
            where=place,
            got=repr(value[error.start : error.end]),
            fix="write the file again in UTF-8",
        ) from error
    return value


FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Iterable[Message]]] = {
    "alpaca": parse_alpaca,
    "conversations": parse_conversations,
}


def main() -> None:
    """The stage `ingest@SOURCE`."""
    with process.stage(__doc__, "out", item="source") as stage:
        source = stage.params.ingest.sources[stage.item]
        about: dict[str, Any] = {"source": stage.item, "licence": source.licence}
        with whole_folder(stage.path("out"), about) as folder:
            about["rows"] = write_records(folder, read_source(stage.item, source))
            about["path"], about["sha256"] = source.path, digest(Path(source.path))
        print(f"ingest {stage.item}: {sum(about['rows'].values())} rows from {source.path}", flush=True)


if __name__ == "__main__":
    main()
