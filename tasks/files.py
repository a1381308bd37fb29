"""Rows out of any file of rows: what a file is, its bytes tell, and its name only where bytes cannot.

JSON arrays, one JSON value per line, CSV, TSV, Parquet, Arrow and plain text; each also inside gz, zst or zip. Files
are read as streams: the memory taken does not grow with the file. What is no data is refused by what it is.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tasks.errors import BadData

if TYPE_CHECKING:
    import pyarrow as pa

MAX_VALUE_CHARACTERS = 16 << 20
"""The longest line, JSON row or CSV field."""

MAX_EXPANDED_BYTES = 20 << 30
MAX_EXPANSION = 1000
"""A compressed file may grow to this size, and beyond its first 16 MiB by this factor."""

DEEPEST = 64
"""Levels of nesting in a JSON row."""

_BLOCK = 1 << 20
_DOCUMENT_END = "<|endoftext|>"
_PROSE = re.compile(
    r"^(readme|licen[sc]e|citation|notice|copying|source|manifest|changelog)[^.]*(\.txt|\.rst|\.cff)?$|\.md$",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """One row as the file holds it.

    Attributes:
        file: the path given, and for a member of an archive `!` and its name.
        number: the line of the row's beginning (JSON lines, CSV, text) or its number (arrays, tables), from 1.
        value: what stands there.
    """

    file: str
    number: int
    value: Any


def read_rows_of(path: Path, encoding: str = "utf-8", place: str = "") -> Iterator[Row]:
    """The rows of one file, in its order.

    Args:
        path: the file.
        encoding: of text files; one whose line ends are those of ASCII.
        place: what the file is called in errors and rows; its path unless given.

    Raises:
        BadData: it is missing, empty, damaged, not data at all, or not in that encoding.
    """
    if not path.exists():
        raise BadData("there is no such file", where=str(path), fix="correct the path")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise BadData(f"is {kind}", where=str(path), expected="a file", fix="name a file, or a folder with a glob")
    with path.open("rb") as file:
        found = False
        for row in _read(_Named(file, place or str(path), path.name), encoding):
            found = True
            yield row
    if not found:
        raise BadData("holds no rows", where=str(path), expected="at least one row", fix="fetch the file again")


def is_prose(name: str) -> bool:
    """Whether a file's name says that it lies beside the data and is none: README, LICENSE, SOURCE.txt and the like."""
    return _PROSE.search(name) is not None


class _Named(NamedTuple):
    """A stream of bytes, where it comes from, and the name that tells its kind."""

    stream: IO[bytes]
    place: str
    name: str


def _read(source: _Named, encoding: str, inside: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a stream, behind whatever packing; `inside` are the packings that were opened before."""
    head = source.stream.read(4096)
    source.stream.seek(0)
    _refuse_what_is_no_data(source, head)
    packing = next((name for magic, name in _PACKINGS.items() if head.startswith(magic)), "")
    if packing:
        if len(inside) == 2 or packing in inside:
            raise BadData("is packed more than twice", where=source.place, fix="unpack it once")
        yield from _UNPACK[packing](source, encoding, (*inside, packing))
    elif head.startswith(b"PAR1"):
        yield from _read_parquet(source)
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from _read_arrow(source, is_file=head.startswith(b"ARROW1"))
    else:
        yield from _read_text(source, head, encoding)


def _refuse_what_is_no_data(source: _Named, head: bytes) -> None:
    where = source.place
    if not head:
        raise BadData("is empty (0 bytes)", where=where, expected="at least one row", fix="fetch the file again")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise BadData(
            "is a Git LFS pointer: it stands for the data, which was not fetched",
            where=where,
            got=head.decode("ascii", "replace").replace("\n", " ").strip()[:120],
            fix="run `git lfs pull` where the file comes from",
        )
    if re.match(rb"\s*(?:<!doctype html|<html|<\?xml|<head)", head, re.IGNORECASE):
        raise BadData("is a web page or XML, not rows", where=where, fix="check the address and the credentials")
    for magic, what in _NO_DATA.items():
        if head.startswith(magic):
            raise BadData(f"is {what}, not rows", where=where, expected=EXPECTED)


EXPECTED = "json, jsonl, csv, tsv, parquet, arrow or txt, also gz, zst or zip"
_PACKINGS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip"}
_NO_DATA = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "a database",
    b"\x7fELF": "a program",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}


# --- packings ---------------------------------------------------------------------------------------------------------


def _read_packed(source: _Named, encoding: str, inside: Sequence[str]) -> Iterator[Row]:
    """The rows of a gz or zst file."""
    inner = re.sub(r"\.(gz|gzip|zst|zstd)$", "", source.name, flags=re.IGNORECASE)
    with _unpacked(source, inside[-1]) as stream:
        yield from _read(_Named(stream, source.place, inner), encoding, inside)


@contextmanager
def _unpacked(source: _Named, packing: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes in a temporary file, because tables are read from their end and packings are not."""
    import pyarrow as pa

    packed_bytes = source.stream.seek(0, io.SEEK_END)
    source.stream.seek(0)
    with tempfile.TemporaryFile() as file:
        try:
            if packing == "gz":
                with gzip.open(source.stream) as stream:
                    _copy(stream, file, source.place, packed_bytes)
            else:
                with pa.CompressedInputStream(pa.PythonFile(source.stream, mode="r"), "zstd") as stream:
                    _copy(stream, file, source.place, packed_bytes)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            _raise_if_storage(error)
            raise BadData(
                f"is a damaged {packing} file",
                where=source.place,
                got=str(error).split("\n")[0],
                fix="fetch the file again",
            ) from error
        file.seek(0)
        yield file


def _raise_if_storage(error: Exception) -> None:
    """Lets a full or broken disk be told as what it is."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _most_bytes(packed_bytes: int) -> int:
    """What so many packed bytes may expand to."""
    return min(MAX_EXPANDED_BYTES, max(_BLOCK << 4, packed_bytes * MAX_EXPANSION))


def _copy(stream: Any, file: IO[bytes], place: str, packed_bytes: int) -> None:
    limit, size = _most_bytes(packed_bytes), 0
    while block := stream.read(_BLOCK):
        size += len(block)
        if size > limit:
            raise BadData(
                "expands too far; was it made to fill the disk?",
                where=place,
                got=f"more than {size:,} bytes out of {packed_bytes:,}",
                expected=f"at most {limit:,}",
            )
        file.write(block)


def _read_zip(source: _Named, encoding: str, inside: Sequence[str]) -> Iterator[Row]:
    """The rows of every data file in a zip archive, by name."""
    try:
        with zipfile.ZipFile(source.stream) as archive:
            members = [m for m in sorted(archive.infolist(), key=lambda m: m.filename) if not m.is_dir()]
            for member in members:
                _check_member(member, source.place)
            data = [m for m in members if not is_prose(PurePosixPath(m.filename).name) and not _of_the_packer(m)]
            total = sum(m.file_size for m in data)
            if total > MAX_EXPANDED_BYTES or any(m.file_size > _most_bytes(m.compress_size) for m in data):
                raise BadData(
                    "expands too far; was it made to fill the disk?", where=source.place, got=f"{total:,} bytes"
                )
            for member in data:
                place = f"{source.place}!{member.filename}"
                with archive.open(member) as packed, tempfile.TemporaryFile() as file:
                    _copy(packed, file, place, member.compress_size)
                    file.seek(0)
                    name = PurePosixPath(member.filename).name
                    yield from _read(_Named(file, place, name), encoding, inside)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise BadData(
            "is a damaged zip archive", where=source.place, got=str(error), fix="fetch the file again"
        ) from error


def _of_the_packer(member: zipfile.ZipInfo) -> bool:
    """What a Mac puts into archives beside the files."""
    path = PurePosixPath(member.filename)
    return path.parts[0] == "__MACOSX" or path.name.startswith(".")


def _check_member(member: zipfile.ZipInfo, archive: str) -> None:
    where, path = f"{archive}!{member.filename}", PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise BadData("a member of the archive leads out of it", where=where, fix="do not trust this archive")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise BadData("a member of the archive is a link", where=where, fix="pack the file itself")
    if member.flag_bits & 1:
        raise BadData("the archive is encrypted", where=where, fix="unpack it")


_UNPACK: dict[str, Callable[[_Named, str, Sequence[str]], Iterator[Row]]] = {
    "gz": _read_packed,
    "zst": _read_packed,
    "zip": _read_zip,
}


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_parquet(source: _Named) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.stream)
        yield from _rows_of_batches(file.iter_batches(batch_size=1024), source.place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_storage(error)
        raise _damaged("Parquet", source, error) from error


def _read_arrow(source: _Named, *, is_file: bool) -> Iterator[Row]:
    import pyarrow as pa

    try:
        if is_file:
            reader = pa.ipc.open_file(source.stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source.stream))
        yield from _rows_of_batches(batches, source.place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_storage(error)
        raise _damaged("Arrow", source, error) from error


def _damaged(kind: str, source: _Named, error: Exception) -> BadData:
    return BadData(
        f"is not a whole {kind} file",
        where=source.place,
        got=str(error).split("\n")[0],
        fix="fetch the file again",
    )


def _rows_of_batches(batches: Iterator[pa.RecordBatch], place: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        repeated = {name for name in batch.schema.names if batch.schema.names.count(name) > 1}
        if repeated:
            raise BadData(f'column "{min(repeated)}" appears twice', where=place, fix="rename one of them")
        for start in range(0, batch.num_rows, 1024):
            for value in batch.slice(start, 1024).to_pylist():
                number += 1
                yield Row(place, number, value)


# --- text -------------------------------------------------------------------------------------------------------------


def _read_text(source: _Named, head: bytes, encoding: str) -> Iterator[Row]:
    ending = PurePosixPath(source.name).suffix.lower()
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and encoding == "utf-8":
        raise BadData("is not UTF-8 but UTF-16", where=f"{source.place}:1", fix="convert it with iconv")
    if b"\0" in head and encoding == "utf-8":
        raise BadData(
            "is not text", where=source.place, got=f"bytes that begin with {head[:8].hex(' ')}", expected=EXPECTED
        )
    beginning = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if ending == ".txt" and re.match(rb'(?:\[\s*)?\{\s*"', beginning):
        ending = ".json"  # rows under the name of a text
    if ending in _BY_NAME:
        yield from _BY_NAME[ending](source, encoding)
    elif beginning.startswith(b"["):
        yield from _read_array(source, encoding)
    elif beginning.startswith(b"{") or ending in (".json", ".jsonl", ".ndjson"):
        yield from _read_lines(source, encoding)
    else:
        raise BadData(
            "is no kind of file that is known",
            where=source.place,
            got=f'"{ending or source.name}", which begins with {head[:40].decode(encoding, "replace")!r}',
            expected=EXPECTED,
        )


def _lines(source: _Named, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, without line ends and byte order mark."""
    for number, raw in enumerate(_raw_lines(source), start=1):
        yield number, _decode(raw, source.place, number, encoding).rstrip("\r\n")


def _raw_lines(source: _Named) -> Iterator[bytes]:
    number = 0
    while line := source.stream.readline(MAX_VALUE_CHARACTERS + 1):
        number += 1
        if len(line) > MAX_VALUE_CHARACTERS:
            raise BadData(
                f"is longer than {MAX_VALUE_CHARACTERS >> 20} MiB in one line",
                where=f"{source.place}:{number}",
                fix="write one row per line, or one JSON array",
            )
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _decode(raw: bytes, place: str, number: int, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02X} at byte {error.start + 1} of the line"
        raise _other_encoding(encoding, f"{place}:{number}", got) from error


def _other_encoding(encoding: str, where: str, got: str) -> BadData:
    fix = "convert it with iconv, or name its encoding in the source's params"
    return BadData(f"is not {encoding.upper()}", where=where, got=got, fix=fix)


def _read_lines(source: _Named, encoding: str) -> Iterator[Row]:
    """One JSON value per line."""
    first = True
    for number, line in _lines(source, encoding):
        if not line.strip():
            continue
        try:
            value = _parse(line, source.place, number)
        except BadData as error:
            if first:
                _refuse_one_object(source, encoding, error)
            raise
        first = False
        yield Row(source.place, number, value)


def _refuse_one_object(source: _Named, encoding: str, error: BadData) -> None:
    """A file that is one object over many lines is told as that."""
    source.stream.seek(0)
    text = source.stream.read(MAX_VALUE_CHARACTERS).decode(encoding, "replace").removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip()[:1] not in "[{":
            raise BadData(
                "is not JSON",
                where=f"{source.place}:1",
                got=f"text that begins with {text.strip()[:40]!r}",
                expected="an array of rows, or one row per line",
            ) from error
        return
    if isinstance(value, dict) and "\n" in text.strip():
        raise BadData(
            "is one JSON object, not rows",
            where=source.place,
            got=f"the keys {', '.join(list(value)[:5])}",
            expected="an array of rows, or one row per line",
        ) from error


def _read_array(source: _Named, encoding: str) -> Iterator[Row]:
    """The elements of a JSON array, decoded one by one while the file is read."""
    text = codecs.getreader("utf-8-sig" if encoding == "utf-8" else encoding)(source.stream)
    buffer, line, number = "", 1, 0
    more = True

    def fill() -> None:
        nonlocal buffer, more
        try:
            block = text.read(_BLOCK)
        except UnicodeDecodeError as error:
            at = line + buffer.count("\n") + error.object[: error.start].count(b"\n")
            got = f"byte 0x{error.object[error.start]:02X}"
            raise _other_encoding(encoding, f"{source.place}:{at}", got) from error
        more = bool(block)
        buffer += block

    def skip() -> str:
        """Drops white space from the buffer's front; returns the next character, or nothing."""
        nonlocal buffer, line
        while True:
            stripped = buffer.lstrip(" \t\r\n")
            line += buffer.count("\n", 0, len(buffer) - len(stripped))
            buffer = stripped
            if buffer or not more:
                return buffer[:1]
            fill()

    skip()
    buffer = buffer[1:]  # the bracket
    while (following := skip()) and following != "]":
        try:
            value, end = _DECODER.raw_decode(buffer)
            if end == len(buffer) and more:
                raise json.JSONDecodeError("may go on", buffer, end)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            if more and isinstance(error, json.JSONDecodeError) and len(buffer) < MAX_VALUE_CHARACTERS:
                fill()
                continue
            raise _json_error(error, buffer, source.place, line) from error
        number += 1
        _check_depth(value, f"{source.place}:{number}")
        yield Row(source.place, number, value)
        line += buffer.count("\n", 0, end)
        buffer = buffer[end:]
        if (following := skip()) == ",":
            buffer = buffer[1:]
            if skip() == "]":
                raise BadData("is not valid JSON: a comma before the end", where=f"{source.place}:{line}")
        elif following != "]":
            cut = not following
            raise BadData(
                "is cut off; was the download complete?" if cut else "is not valid JSON: a comma is missing",
                where=f"{source.place}:{line}",
                got=repr(buffer[:20]),
                expected='"," or "]"',
            )
    if not following:
        raise BadData("is cut off; was the download complete?", where=f"{source.place}:{line}", expected='"]"')
    buffer = buffer[1:]
    if skip():
        raise BadData("goes on after the array's end", where=f"{source.place}:{line}", got=repr(buffer[:20]))


def _parse(text: str, place: str, line: int) -> Any:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(error, text, place, line) from error
    _check_depth(value, f"{place}:{line}")
    return value


def _json_error(error: Exception, text: str, place: str, line: int) -> BadData:
    where = f"{place}:{line}"
    if isinstance(error, json.JSONDecodeError):
        at = f"{place}:{line + error.lineno - 1}:{error.colno}"
        if len(text) >= MAX_VALUE_CHARACTERS:
            return BadData(f"has a row longer than {MAX_VALUE_CHARACTERS >> 20} MiB, or one that never ends", where=at)
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        return BadData(
            "is cut off; was the download complete?" if cut else f"is not valid JSON: {error.msg}",
            where=at,
            got=repr(text[max(0, error.pos - 20) : error.pos + 20]),
            expected="JSON",
        )
    if isinstance(error, RecursionError):
        return BadData("is nested too deeply", where=where, expected=f"at most {DEEPEST} levels")
    if isinstance(error, _NotJson):
        return BadData(str(error), where=where, fix="correct this row")
    return BadData("holds a number that is too long", where=where, got=str(error))


class _NotJson(ValueError):
    """Something that Python's parser lets pass and JSON does not, or that would lose data."""


def _refuse_constant(constant: str) -> None:
    raise _NotJson(f"{constant} is not valid JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _NotJson(f'key "{next(k for k in keys if keys.count(k) > 1)}" appears twice in one object')
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotJson(f"{text} is too large for a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_repeats)


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [
        inner
        for each in level
        if isinstance(each, (dict, list))
        for inner in (each.values() if isinstance(each, dict) else each)
        if isinstance(inner, (dict, list))
    ]:
        depth += 1
        if depth >= DEEPEST:
            raise BadData("is nested too deeply", where=where, expected=f"at most {DEEPEST} levels")


def _read_table(source: _Named, encoding: str, delimiter: str) -> Iterator[Row]:
    """The rows of a delimited table with a header; a column without a name is left out."""
    csv.field_size_limit(MAX_VALUE_CHARACTERS)
    reader = csv.reader((line + "\n" for _, line in _lines(source, encoding)), delimiter=delimiter, strict=True)
    header: list[str] = []
    begun = 1
    while True:
        begun = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            raise BadData(
                "a quote is opened and never closed" if unclosed else "is not a proper table",
                where=f"{source.place}:{begun}",
                got=str(error),
                fix='write a quote inside a field as ""',
            ) from error
        if not header:
            header = _check_header(fields, source.place, delimiter)
        elif fields and len(fields) != len(header):
            raise BadData(
                f"has {len(fields)} fields",
                where=f"{source.place}:{begun}",
                expected=f"{len(header)}, as the header",
                fix="quote fields that hold the delimiter",
            )
        elif fields:
            yield Row(source.place, begun, {n: v for n, v in zip(header, fields, strict=True) if n})


def _check_header(fields: list[str], place: str, delimiter: str) -> list[str]:
    names = [name.strip() for name in fields]
    repeated = {name for name in names if name and names.count(name) > 1}
    if repeated:
        raise BadData(f'column "{min(repeated)}" appears twice', where=f"{place}:1", fix="rename one of them")
    if len(names) == 1:
        other = next((mark for mark in ";\t|," if mark != delimiter and mark in names[0]), "")
        if other:
            raise BadData(
                f'has only one column; its delimiter looks like "{other}"'.replace("\t", "tab"),
                where=f"{place}:1",
                expected="commas in .csv, tabs in .tsv",
            )
    return names


def _read_documents(source: _Named, encoding: str) -> Iterator[Row]:
    """The texts of a file: between its <|endoftext|> marks where it has any near its beginning, else its paragraphs."""
    place = source.stream.tell()
    marked = _DOCUMENT_END.encode() in source.stream.read(_BLOCK)
    source.stream.seek(place)
    lines: list[str] = []
    begun = size = 0
    for number, line in _lines(source, encoding):
        parts = line.split(_DOCUMENT_END) if marked else [line]
        for index, part in enumerate(parts):
            if (index or (not marked and not part.strip())) and lines:
                yield Row(source.place, begun, {"text": "\n".join(lines).strip()})
                lines, size = [], 0
            if part.strip() or lines:
                begun = begun if lines else number
                lines.append(part)
                size += len(part)
                if size > MAX_VALUE_CHARACTERS:
                    raise BadData("holds a text of more than 16 MiB", where=f"{source.place}:{begun}")
    if "".join(lines).strip():
        yield Row(source.place, begun, {"text": "\n".join(lines).strip()})


_BY_NAME: dict[str, Callable[[_Named, str], Iterator[Row]]] = {
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".txt": _read_documents,
}
