"""Every kind of file, in every packing; and what is no data, told as what it is."""

from __future__ import annotations

import csv
import gzip
import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.errors import BadData
from tasks.readers import text_files
from tasks.readers.files import read_rows_of

ROWS = [{"instruction": "Add.", "output": "3"}, {"instruction": "猫是什么?\nSay.", "output": 'a "cat", ☃'}]


def as_json() -> bytes:
    return json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


def as_jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_table(dialect: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "output"], delimiter=dialect)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def as_arrow(*, stream: bool) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[], bytes]] = {
    "a.json": as_json,
    "a.jsonl": as_jsonl,
    "array.jsonl": as_json,
    "lines.json": as_jsonl,
    "no ending": as_jsonl,
    "a.csv": lambda: as_table(","),
    "a.tsv": lambda: as_table("\t"),
    "a.parquet": as_parquet,
    "a.arrow": lambda: as_arrow(stream=False),
    "stream.arrow": lambda: as_arrow(stream=True),
}


def in_zip(name: str, content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("README.md", "what this is")
        file.writestr(f"folder/{name}", content)
    return archive.getvalue()


PACKINGS: dict[str, Callable[[str, bytes], bytes]] = {
    "": lambda _, content: content,
    ".gz": lambda _, content: gzip.compress(content),
    ".zst": lambda _, content: bytes(pa.compress(content, "zstd", asbytes=True)),
    ".zip": in_zip,
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKINGS[packing](name, KINDS[name]()))
    assert [row.value for row in read_rows_of(path)] == ROWS


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    lines, archive = tmp_path / "a.jsonl", tmp_path / "b.zip"
    lines.write_bytes(b"\xef\xbb\xbf{}\r\n\r\n{}")
    archive.write_bytes(in_zip("c.csv", b'x\n"two\nlines"\nlast\n'))
    assert [row[:2] for row in read_rows_of(lines)] == [(str(lines), 1), (str(lines), 3)]
    assert [row[:2] for row in read_rows_of(archive)] == [
        (f"{archive}!folder/c.csv", 2),
        (f"{archive}!folder/c.csv", 4),
    ]


def test_texts_are_told_apart_by_marks_or_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_text("one\n\nstill one<|endoftext|>\ntwo\n<|endoftext|>\n<|endoftext|>")
    (tmp_path / "plain.txt").write_bytes(b"one\r\nstill one\r\n\r\n \r\ntwo\r\n")
    marked = list(read_rows_of(tmp_path / "marked.txt"))
    assert [(row.number, row.value["text"]) for row in marked] == [(1, "one\n\nstill one"), (4, "two")]
    assert [row.value["text"] for row in read_rows_of(tmp_path / "plain.txt")] == ["one\nstill one", "two"]


def test_rows_under_the_name_of_a_text_are_rows(tmp_path: Path) -> None:
    for name, content in (("a.txt", as_jsonl()), ("b.txt", as_json())):
        (tmp_path / name).write_bytes(content)
        assert [row.value for row in read_rows_of(tmp_path / name)] == ROWS


def test_what_a_mac_packs_besides_is_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", as_jsonl())
        archive.writestr("__MACOSX/._a.jsonl", b"\0\5\x16\7")
    assert [row.value for row in read_rows_of(tmp_path / "a.zip")] == ROWS


def test_another_encoding_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Äpfel".encode("latin-1"))
    assert [row.value for row in read_rows_of(path, "latin-1")] == [{"text": "Äpfel"}]


def test_an_array_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements that lie across the blocks of the file, at every place that a block can end."""
    path = tmp_path / "a.json"
    values = [{"n": 123456, "s": 'x"]},\\ é☃', "l": [1, [2]]}, {}, {"t": True}]
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1))
    for block in range(1, 40):
        monkeypatch.setattr(text_files, "_BLOCK", block)
        assert [row.value for row in read_rows_of(path)] == values


def a_zip(change: Callable[[zipfile.ZipFile], object]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        change(file)
    return archive.getvalue()


def a_link() -> zipfile.ZipInfo:
    link = zipfile.ZipInfo("link.jsonl")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


def of_schema(kind: pa.DataType, value: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array([value], kind)}), sink)
    return bytes(sink.getvalue())


GOOD = b'{"instruction": "a", "output": "b"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:8be3\nsize 875191\n"

MALFORMED: dict[str, tuple[bytes, str, str]] = {
    # what is no data
    "empty.jsonl": (b"", "is empty (0 bytes)", "empty.jsonl"),
    "empty.parquet": (b"", "is empty (0 bytes)", "empty.parquet"),
    "blank.jsonl": (b"\n \n", "holds no rows", "blank.jsonl"),
    "empty array.json": (b"[]", "holds no rows", "empty array.json"),
    "header.csv": (b"instruction,output\n", "holds no rows", "header.csv"),
    "blank.txt": (b" \n\n\t", "holds no rows", "blank.txt"),
    "pointer.jsonl": (POINTER, "Git LFS pointer", "pointer.jsonl"),
    "pointer.jsonl.gz": (POINTER, "Git LFS pointer", "pointer.jsonl.gz"),
    "pointer.parquet": (POINTER, "Git LFS pointer", "pointer.parquet"),
    "page.json": (b"<!DOCTYPE html><html>403", "is a web page", "page.json"),
    "page.jsonl": (b"\n <html><body>Log in", "is a web page", "page.jsonl"),
    "feed.xml": (b'<?xml version="1.0"?><a/>', "is a web page or XML", "feed.xml"),
    "paper.pdf": (b"%PDF-1.7 ...", "is a PDF document", "paper.pdf"),
    "cat.jsonl": (b"\x89PNG\r\n\x1a\n....", "is a picture", "cat.jsonl"),
    "rows.pkl": (b"\x80\x04\x95abc", "is a pickle", "rows.pkl"),
    "rows.jsonl.bz2": (b"BZh91AY", "packed with bzip2", "rows.jsonl.bz2"),
    "rows.xz": (b"\xfd7zXZ\x00", "packed with xz", "rows.xz"),
    "db.sqlite": (b"SQLite format 3\x00", "is a database", "db.sqlite"),
    "weights.safetensors": (b"\xf8\x12\0\0\0\0\0\0{}", "is not text", "weights.safetensors"),
    "notes.docx": (b"dear diary", "is no kind of file that is known", "notes.docx"),
    "words.json": (b"This data is bad! We can't use it to tune.", "is not JSON", "words.json:1"),
    "config.json": (b'{\n "a": 1,\n "b": {}\n}', "is one JSON object, not rows", "config.json"),
    # encodings
    "utf16le.jsonl": (GOOD.decode().encode("utf-16"), "is not UTF-8 but UTF-16", "utf16le.jsonl:1"),
    "utf16be.jsonl": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "is not UTF-8 but UTF-16", "utf16be.jsonl:1"),
    "utf16 no mark.json": (GOOD.decode().encode("utf-16-le"), "is not text", "utf16 no mark.json"),
    "latin.jsonl": (GOOD + b'{"instruction": "\xe9"}', "is not UTF-8", "latin.jsonl:2"),
    "latin.json": (b'[\n{"a": "b"},\n{"a": "\xe9"}]', "is not UTF-8", "latin.json:3"),
    "latin.csv": (b"a,b\nx,y\n\xe9,z\n", "is not UTF-8", "latin.csv:3"),
    "latin.txt": (b"one\n\nd\xe9cor", "is not UTF-8", "latin.txt:3"),
    "nul.jsonl": (b'{"a": "\0"}\n', "is not text", "nul.jsonl"),
    # JSON
    "cut.jsonl": (GOOD + b'{"instruction": "Ad', "is cut off", "cut.jsonl:2:17"),
    "cut.json": (b'[\n{"a": "b"},\n{"a": ', "is cut off", "cut.json:3"),
    "cut after a row.json": (b'[{"a": "b"}', "is cut off", "cut after a row.json:1"),
    "cut after a comma.json": (b'[{"a": "b"},', "is cut off", "cut after a comma.json:1"),
    "broken.jsonl": (GOOD + b'{"instruction": a}\n', "is not valid JSON", "broken.jsonl:2:17"),
    "broken.json": (b'[\n{"a": "b",\n "output": oops}\n]', "is not valid JSON", "broken.json:3:12"),
    "no comma.json": (b'[{"a": "b"}\n{"a": "c"}]', "a comma is missing", "no comma.json:2"),
    "last comma.json": (b'[{"a": "b"},\n]', "a comma before the end", "last comma.json:2"),
    "two arrays.json": (b'[{"a": "b"}]\n[{"a": "c"}]', "goes on after the array's end", "two arrays.json:2"),
    "single quotes.jsonl": (b"{'a': 'b'}\n", "is not valid JSON", "single quotes.jsonl:1:2"),
    "nan.jsonl": (b'{"output": NaN}\n', "NaN is not valid JSON", "nan.jsonl:1"),
    "nan.json": (b'[{"a": "b"},\n{"output": NaN}]', "NaN is not valid JSON", "nan.json:2"),
    "infinity.jsonl": (b'{"output": -Infinity}\n', "-Infinity is not valid JSON", "infinity.jsonl:1"),
    "huge.jsonl": (b'{"a": 1e400}\n', "is too large for a number", "huge.jsonl:1"),
    "twice.jsonl": (GOOD + b'{"a": 1, "a": 2}\n', 'key "a" appears twice', "twice.jsonl:2"),
    "twice.json": (b'[{"b": {"a": 1, "a": 2}}]', 'key "a" appears twice', "twice.json:1"),
    "deep.json": (b"[" * 100_000, "nested too deeply", "deep.json"),
    "deep.jsonl": (b'{"a":' * 70 + b"1" + b"}" * 70, "nested too deeply", "deep.jsonl:1"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", "a number that is too long", "digits.jsonl:1"),
    "control.jsonl": (b'{"a": "x\x01y"}\n', "is not valid JSON", "control.jsonl:1"),
    # tables
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "has 3 fields", "ragged.csv:3"),
    "short.csv": (b"a,b\n1\n", "has 1 fields", "short.csv:2"),
    "quote.csv": (b'a,b\n1,2\n"3,4\n', "a quote is opened and never closed", "quote.csv:3"),
    "quote inside.csv": (b'a,b\n"1"x,2\n', "is not a proper table", "quote inside.csv:2"),
    "columns.csv": (b"a,a\n1,2\n", 'column "a" appears twice', "columns.csv:1"),
    "semicolons.csv": (b"a;b\n1;2\n", 'its delimiter looks like ";"', "semicolons.csv:1"),
    "commas.tsv": (b"a,b\n1,2\n", 'its delimiter looks like ","', "commas.tsv:1"),
    "cut.parquet": (as_parquet()[:200], "is not a whole Parquet file", "cut.parquet"),
    "magic.parquet": (b"PAR1", "is not a whole Parquet file", "magic.parquet"),
    "no footer.parquet": (b"PAR1 and then nothing", "is not a whole Parquet file", "no footer.parquet"),
    "cut.arrow": (as_arrow(stream=False)[:150], "is not a whole Arrow file", "cut.arrow"),
    "cut stream.arrow": (as_arrow(stream=True)[:-60], "is not a whole Arrow file", "cut stream.arrow"),
    # packings
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-9], "is a damaged gz file", "cut.jsonl.gz"),
    "flipped.jsonl.gz": (gzip.compress(GOOD)[:-6] + b"abcdef", "is a damaged gz file", "flipped.jsonl.gz"),
    "middle.jsonl.gz": (
        gzip.compress(as_jsonl() * 9)[:30] + b"\xff\xff" + gzip.compress(as_jsonl() * 9)[32:],
        "is a damaged gz file",
        "middle.jsonl.gz",
    ),
    "cut.zst": (bytes(pa.compress(GOOD * 99, "zstd", asbytes=True))[:-5], "is a damaged zst file", "cut.zst"),
    "bomb.jsonl.gz": (gzip.compress(b"\0" * (64 << 20)), "expands too far", "bomb.jsonl.gz"),
    "bomb.zip": (a_zip(lambda z: z.writestr("a.jsonl", b"\0" * (64 << 20))), "expands too far", "bomb.zip"),
    "nested.gz": (gzip.compress(gzip.compress(GOOD)), "packed more than twice", "nested.gz"),
    "climbing.zip": (
        a_zip(lambda z: z.writestr("../evil.jsonl", GOOD)),
        "leads out of it",
        "climbing.zip!../evil.jsonl",
    ),
    "absolute.zip": (a_zip(lambda z: z.writestr("/etc/evil.jsonl", GOOD)), "leads out of it", "absolute.zip!/etc"),
    "link.zip": (a_zip(lambda z: z.writestr(a_link(), "/etc/passwd")), "is a link", "link.zip!link.jsonl"),
    "program.zip": (a_zip(lambda z: z.writestr("a.exe", b"MZ\0\0")), "is not text", "program.zip!a.exe"),
    "empty.zip": (a_zip(lambda z: None), "holds no rows", "empty.zip"),
    "prose.zip": (a_zip(lambda z: z.writestr("LICENSE", "do")), "holds no rows", "prose.zip"),
    "cut.zip": (in_zip("a.jsonl", GOOD)[:-10], "is a damaged zip archive", "cut.zip"),
    "empty member.zip": (a_zip(lambda z: z.writestr("a.jsonl", b"")), "is empty", "empty member.zip!a.jsonl"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str) -> None:
    content, what, where = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as caught:
        list(read_rows_of(tmp_path / name))
    assert what in caught.value.what
    assert f"{tmp_path}/{where}" in f"{caught.value.where}"
    assert caught.value.exit_code == 65


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for name, what in (("missing", "there is no such file"), (".", "is a folder"), ("fifo", "is no regular file")):
        with pytest.raises(BadData, match=what):
            list(read_rows_of(tmp_path / name))


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """100 MB in one line, held to a fraction of that."""
    import tracemalloc

    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(BadData, match="longer than 16 MiB in one line"):
        list(read_rows_of(path))
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    path.rename(tmp_path / "long.json")
    (tmp_path / "long.json").write_bytes(b"[" + path.with_name("long.json").read_bytes())
    with pytest.raises(BadData, match="longer than 16 MiB"):
        list(read_rows_of(tmp_path / "long.json"))
