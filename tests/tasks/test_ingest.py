from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import BadData
from tasks.ingest import read_source
from tasks.params import FileSource, GeneratorSource
from tasks.records import ChatExample, Message, Record
from tests.conftest import ROOT

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def source(path: Path, form: str = "auto") -> FileSource:
    return FileSource.model_validate({"kind": "file", "path": str(path), "format": form, "licence": "CC0-1.0"})


def rows(path: Path, form: str = "auto") -> list[Record]:
    return list(read_source("s", source(path, form)))


def write(path: Path, values: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(values), path)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_alpaca(tmp_path: Path, ending: str) -> None:
    found = rows(write(tmp_path / f"a.{ending}", [ALPACA, {**ALPACA, "input": ""}]))
    assert [r.messages for r in found if isinstance(r, ChatExample)] == [
        (Message("user", "Add.\n1 and 2"), Message("assistant", "3")),
        (Message("user", "Add."), Message("assistant", "3")),
    ]
    assert [r.id for r in found] == ["s-1", "s-2"]
    assert {r.source for r in found} == {"s"}


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_conversations(tmp_path: Path, ending: str) -> None:
    (found,) = rows(write(tmp_path / f"a.{ending}", [CHAT]))
    assert isinstance(found, ChatExample)
    assert found.messages == (Message("user", "Hi"), Message("assistant", "Hello"))


def test_the_text_of_a_row_is_not_touched(tmp_path: Path) -> None:
    text = "  two spaces, \u00a0 and a newline\n"
    chat = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    (found,) = rows(write(tmp_path / "a.json", [chat]))
    assert isinstance(found, ChatExample)
    assert {m.content for m in found.messages} == {text}


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode() + b"\r\n\r\n" + json.dumps(ALPACA).encode())
    assert [r.id for r in rows(path)] == ["s-1", "s-3"]  # the line in the file, so that a person finds it


BAD = {
    "missing.json": (None, "there is no such file", "missing.json"),
    "empty.jsonl": (b"", "is empty (0 bytes)", "empty.jsonl"),
    "blank.jsonl": (b"\n\n", "holds no rows", "blank.jsonl"),
    "empty.json": (b"[]", "holds no rows", "empty.json"),
    "cut.jsonl": (json.dumps(ALPACA).encode() + b'\n{"instruction": "Ad', "is cut off", "cut.jsonl:2:"),
    "broken.jsonl": (
        b'{"instruction": "a", "output": "b"}\n{"instruction": a}\n',
        "is not valid JSON",
        "broken.jsonl:2:17",
    ),
    "broken.json": (b'[\n{"instruction": "a",\n "output": oops}\n]', "is not valid JSON", "broken.json:3:12"),
    "nan.jsonl": (b'{"instruction": "a", "output": NaN}', "NaN is not valid JSON", "nan.jsonl"),
    "latin.jsonl": (b'{"instruction": "a", "output": "b"}\n{"instruction": "\xe9"}', "is not UTF-8", "latin.jsonl:2"),
    "utf16.jsonl": ('{"instruction": "a"}'.encode("utf-16"), "is not UTF-8", "utf16.jsonl:1"),
    "deep.json": (b"[" * 100_000, "nested too deeply", "deep.json"),
    "object.json": (b'{"instruction": "a"}', "is not an array of rows", "object.json"),
    "scalar.jsonl": (b"5\n", "is not an object", "scalar.jsonl:1"),
    "null.jsonl": (b"null\n", "is not an object", "null.jsonl:1"),
    "unknown.jsonl": (b'{"prompt": "a"}\n', "is of no known format", "unknown.jsonl:1"),
    "type.jsonl": (b'{"instruction": "a", "output": 5}\n', 'field "output" is not text', "type.jsonl:1"),
    "turns.jsonl": (b'{"conversations": []}\n', "has no conversation", "turns.jsonl:1"),
    "role.jsonl": (
        b'{"conversations": [{"from": "bot", "value": "x"}]}\n',
        "unknown role",
        "role.jsonl:1 conversations[0]",
    ),
    "value.jsonl": (
        b'{"conversations": [{"from": "gpt", "value": null}]}\n',
        'field "value" is not text',
        "conversations[0]",
    ),
    "cut.parquet": (b"PAR1 and then nothing", "not a whole Parquet file", "cut.parquet"),
    "empty.parquet": (b"", "is empty (0 bytes)", "empty.parquet"),
    "page.html": (b"<html>", "unknown kind of file", "page.html"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_and_where(tmp_path: Path, name: str) -> None:
    content, what, where = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as caught:
        rows(tmp_path / name)
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.exit_code == 65


def test_the_generator_is_a_source() -> None:
    generator = GeneratorSource.model_validate(
        {
            "kind": "generator",
            "path": str(ROOT / "data" / "lexicon.yaml"),
            "rows": "chat",
            "count": 7,
            "seed": 1,
            "withheld": 0.0,
            "licence": "Apache-2.0",
        }
    )
    assert len(list(read_source("g", generator))) == 7


def test_real_chats(real_data: Path) -> None:
    found = rows(real_data / "belle_chat_1k" / "test.json")
    assert len(found) == 1000
    turns = [len(r.messages) for r in found if isinstance(r, ChatExample)]
    assert sum(turns) == 5403  # the number of values that data/README.md counts


def test_real_instructions(real_data: Path) -> None:
    found = rows(real_data / "stanford_alpaca" / "alpaca_5000.json")
    assert len(found) == 5000
    empty = [r.id for r in found if isinstance(r, ChatExample) and not r.messages[-1].content]
    assert empty == ["s-2336", "s-4659"]  # rows 2335 and 4658, counted from 0
