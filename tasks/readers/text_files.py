"""Rows out of a text: JSON arrays, one JSON value per line, tables with a delimiter, and plain documents."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from tasks.core.errors import BadData

MAX_VALUE_CHARACTERS = 16 << 20
"""The longest line, JSON row or CSV field."""

DEEPEST = 64
"""Levels of nesting in a JSON row."""

_BLOCK = 1 << 20
_DOCUMENT_END = "<|endoftext|>"
_WHITE = re.compile(r"[ \t\r\n]*")

EXPECTED = "json, jsonl, csv, tsv, parquet, arrow or txt, also gz, zst or zip"


class FileRow(NamedTuple):
    """One row as the file holds it.

    Attributes:
        file: the path given, and for a member of an archive `!` and its name.
        number: the line of the row's beginning (JSON lines, CSV, text) or its number (arrays, tables), from 1.
        value: what stands there; a `BadData` for a row that is not well-formed.
    """

    file: str
    number: int
    value: Any


class Named(NamedTuple):
    """A stream of bytes, where it comes from, and the name that tells its kind."""

    stream: IO[bytes]
    place: str
    name: str


def read_text(source: Named, head: bytes, encoding: str) -> Iterator[FileRow]:
    """Yield the rows of a text, whose kind its first bytes `head` show and, where they do not, its name."""
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


def _lines(source: Named, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text with their numbers, without line ends and byte order mark."""
    for number, raw in enumerate(_raw_lines(source), start=1):
        yield number, _decode(raw, source.place, number, encoding).rstrip("\r\n")


def _raw_lines(source: Named) -> Iterator[bytes]:
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


def _read_lines(source: Named, encoding: str) -> Iterator[FileRow]:
    """Read one JSON value per line."""
    first = True
    for number, line in _lines(source, encoding):
        if not line.strip():
            continue
        try:
            value = _parse(line, source.place, number)
        except BadData as error:
            if first:
                _refuse_one_object(source, encoding, error)
            value = error  # the next line is another row, whatever is wrong with this one
        first = False
        yield FileRow(source.place, number, value)


def _refuse_one_object(source: Named, encoding: str, error: BadData) -> None:
    """Refuse a file that is no JSON, or one object over many lines, with an error for just that."""
    place = source.stream.tell()
    source.stream.seek(0)
    text = source.stream.read(MAX_VALUE_CHARACTERS).decode(encoding, "replace").removeprefix("\ufeff")
    source.stream.seek(place)
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


def _read_array(source: Named, encoding: str) -> Iterator[FileRow]:
    """Yield the elements of a JSON array, decoded one by one while the file is read.

    Not by ijson: its fast parser (3.6.0) makes "?" of half a surrogate pair without a word, and refuses whole numbers
    above 64 bits where others are floats.
    """
    rest, number = _Rest(source, encoding), 0
    rest.skip()
    rest.drop()  # the bracket
    while (following := rest.skip()) and following != "]":
        number += 1
        yield FileRow(source.place, number, rest.decode_or_error(f"{source.place}:{number}"))
        if (following := rest.skip()) == ",":
            rest.drop()
            if rest.skip() == "]":
                raise BadData("is not valid JSON: a comma before the end", where=rest.where)
        elif following != "]":
            cut = not following
            raise BadData(
                "is cut off; was the download complete?" if cut else "is not valid JSON: a comma is missing",
                where=rest.where,
                got=repr(rest.peek(20)),
                expected='"," or "]"',
            )
    if not following:
        raise BadData("is cut off; was the download complete?", where=rest.where, expected='"]"')
    rest.drop()
    if rest.skip():
        raise BadData("goes on after the array's end", where=rest.where, got=repr(rest.peek(20)))


_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]]', re.DOTALL)


class _Rest:
    """Rest of a file that was read and not yet used, and the line that it begins in."""

    def __init__(self, source: Named, encoding: str) -> None:
        self._text, self._at, self._line, self._more = "", 0, 1, True
        self._place, self._encoding = source.place, encoding
        self._reader = codecs.getreader("utf-8-sig" if encoding == "utf-8" else encoding)(source.stream)

    @property
    def where(self) -> str:
        return f"{self._place}:{self._line}"

    def peek(self, characters: int) -> str:
        """Return the next characters, as far as they were read."""
        return self._text[self._at : self._at + characters]

    def use(self, stop: int) -> None:
        """Count what was read up to `stop` as used; it is only cut off with the next block."""
        self._line += self._text.count("\n", self._at, stop)
        self._at = stop

    def drop(self) -> None:
        """Count one character as used."""
        self.use(self._at + 1)

    def skip(self) -> str:
        """Drop white space; return the next character, or nothing."""
        while True:
            self.use(_WHITE.match(self._text, self._at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text) or not self._more:
                return self.peek(1)
            self._fill()

    def decode(self) -> Any:
        """Decode the JSON value that comes next."""
        while True:
            try:
                value, stop = _DECODER.raw_decode(self._text, self._at)
                if stop == len(self._text) and self._more:
                    raise json.JSONDecodeError("may go on", self._text, stop)
            except (RecursionError, ValueError) as error:
                unfinished = (
                    isinstance(error, json.JSONDecodeError) and len(self._text) - self._at < MAX_VALUE_CHARACTERS
                )
                if self._more and unfinished:
                    self._fill()
                elif self._at:
                    self._cut()  # so that the error counts from where the value begins
                else:
                    raise _json_error(error, self._text, self._place, self._line) from error
            else:
                self.use(stop)
                return value

    def decode_or_error(self, where: str) -> Any:
        """Decode the JSON value that comes next; return what is wrong with it where its brackets show its end.

        Raises:
            BadData: they do not, so that nobody knows where the next value begins.
        """
        try:
            value = self.decode()
        except BadData:
            line = self._line
            if not (text := self._bracketed()):
                raise
            try:
                return _parse(text, self._place, line)
            except BadData as error:
                return error
        try:
            _check_depth(value, where)
        except BadData as error:
            return error
        return value

    def _bracketed(self) -> str:
        """Drop and return the object or array that comes next, as far as its brackets go; nothing without an end."""
        while True:
            depth = 0
            for found in _BRACKETS.finditer(self._text, self._at):
                depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
                if depth <= 0:
                    break
            else:
                if self._more and len(self._text) < MAX_VALUE_CHARACTERS:
                    self._fill()
                    continue
                return ""
            if self._text[found.start()] not in "}]":
                return ""
            text = self._text[self._at : found.end()]
            self.use(found.end())
            return text

    def _cut(self) -> None:
        self._text, self._at = self._text[self._at :], 0

    def _fill(self) -> None:
        try:
            block = self._reader.read(_BLOCK)
        except UnicodeDecodeError as error:
            at = self._line + self._text.count("\n", self._at) + error.object[: error.start].count(b"\n")
            got = f"byte 0x{error.object[error.start]:02X}"
            raise _other_encoding(self._encoding, f"{self._place}:{at}", got) from error
        self._more = bool(block)
        self._cut()
        self._text += block


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


def _read_table(source: Named, encoding: str, delimiter: str) -> Iterator[FileRow]:
    """Yield the rows of a delimited table with a header; a column without a name is left out."""
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
            uneven = BadData(
                f"has {len(fields)} fields",
                where=f"{source.place}:{begun}",
                expected=f"{len(header)}, as the header",
                fix="quote fields that hold the delimiter",
            )
            yield FileRow(source.place, begun, uneven)
        elif fields:
            yield FileRow(source.place, begun, {n: v for n, v in zip(header, fields, strict=True) if n})


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


def _read_documents(source: Named, encoding: str) -> Iterator[FileRow]:
    """Yield a file's texts: between its <|endoftext|> marks where it has any near its start, else its paragraphs."""
    place = source.stream.tell()
    marked = _DOCUMENT_END.encode() in source.stream.read(_BLOCK)
    source.stream.seek(place)
    lines: list[str] = []
    begun = size = 0
    for number, line in _lines(source, encoding):
        parts = line.split(_DOCUMENT_END) if marked else [line]
        for index, part in enumerate(parts):
            if (index or (not marked and not part.strip())) and lines:
                yield FileRow(source.place, begun, {"text": "\n".join(lines).strip()})
                lines, size = [], 0
            if part.strip() or lines:
                begun = begun if lines else number
                lines.append(part)
                size += len(part)
                if size > MAX_VALUE_CHARACTERS:
                    raise BadData("holds a text of more than 16 MiB", where=f"{source.place}:{begun}")
    if "".join(lines).strip():
        yield FileRow(source.place, begun, {"text": "\n".join(lines).strip()})


_BY_NAME: dict[str, Callable[[Named, str], Iterator[FileRow]]] = {
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".txt": _read_documents,
}
