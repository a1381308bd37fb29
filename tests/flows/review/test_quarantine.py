"""Released rows, read back by the stage that reads all rows and kept by the one that checks them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from bench.registered import workspace_at
from flows.cli.main import app
from flows.review.quarantine import PARAMS, decide, decisions, quarantined, texts_of, with_texts
from tasks.core.errors import BadData, BadParams
from tasks.core.records import ChatExample, Message, Record
from tasks.ingest.params import FolderSource
from tasks.ingest.stage import Reading
from tasks.orchestration.params import check
from tests.flows.ui.team import ROWS, quarantine_some


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    root = workspace_at(tmp_path / "work")
    quarantine_some(root)
    return root


def content(record: Record) -> dict[str, object]:
    """A row without where it came from."""
    own = {"id", "source", "file", "row"}
    return {each.name: getattr(record, each.name) for each in dataclasses.fields(record) if each.name not in own}


def test_rows_of_every_kind_come_back_as_they_were(workspace: Path) -> None:
    for row in ROWS:
        decide(workspace, row.id, "release", by="lena", why="fine")
    folder = workspace / "data" / "released" / "rows"
    reading = Reading("released", FolderSource(kind="folder", path=str(folder), glob="*.jsonl"))
    read = {record.kind: record for record in reading.records()}
    assert not reading.refused
    assert {kind: content(record) for kind, record in read.items()} == {row.kind: content(row) for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_the_texts_of_a_row_are_all_that_is_edited(row: Record) -> None:
    texts = [text for _, text in texts_of(row)]
    assert with_texts(row, texts) == row
    other = with_texts(row, [f"{text}!" for text in texts])
    assert [text for _, text in texts_of(other)] == [f"{text}!" for text in texts]
    assert type(other) is type(row)
    with pytest.raises(BadParams, match="another number of texts"):
        with_texts(row, [*texts, "more"])


def test_what_a_turn_has_besides_its_text_stays() -> None:
    calls = '[{"name": "f", "arguments": {}}]'
    turns = (Message("user", "a"), Message("assistant", "", calls, learn=False, reasoning="hm", call_id="7"))
    row = ChatExample(id="x", source="s", messages=turns, tools=("{}",))
    changed = with_texts(row, ["b", "c"])
    assert isinstance(changed, ChatExample)
    assert changed.messages[1] == turns[1]._replace(content="c")
    assert changed.tools == row.tools


def test_the_lines_for_params_make_released_rows_a_source_that_is_accepted(workspace: Path) -> None:
    yaml = YAML(typ="safe")
    content, lines = yaml.load(workspace / "params.yaml"), yaml.load(PARAMS)
    content["ingest"]["sources"] |= lines["ingest"]["sources"]
    content["validate"] |= lines["validate"]
    params = check(content, "params.yaml")
    assert params.validate_.accepted == ["released"]
    assert params.ingest.sources["released"].path == "data/released/rows"
    content["validate"]["accepted"] = ["relased"]
    with pytest.raises(BadParams, match='there is no source "relased"; did you mean "released"'):
        check(content, "params.yaml")


def test_decisions_that_cannot_be_read_are_not_overwritten(workspace: Path) -> None:
    decide(workspace, "t", "release", by="lena", why="fine")
    file = workspace / "data" / "released" / "decisions.jsonl"
    with file.open("a") as more:
        more.write('{"id": "p"\n')
    before = file.read_bytes()
    with pytest.raises(BadData, match="is no decision") as caught:
        decide(workspace, "p", "release", by="lena", why="fine")
    assert caught.value.where.endswith("decisions.jsonl:2")
    assert file.read_bytes() == before


def test_the_command_lists_shows_releases_and_takes_back(workspace: Path) -> None:
    def temper(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["quarantine", *words, "--workspace", str(workspace)])
        assert (done.exit_code if not done.exception or done.exit_code != 1 else 65) == code, done.output
        return done.stdout

    assert "chats.jsonl:3" in temper()
    assert [each["id"] for each in json.loads(temper("--json"))] == [row.id for row in ROWS]
    assert json.loads(temper("s"))["row"] == {"input": "one", "target": "eins"}
    said = temper("s", "--release", "--why", "fine", "--text", "one", "--text", "eine", "--by", "lena")
    assert PARAMS in said
    assert [(each.by, each.row) for each in decisions(workspace)] == [("lena", {"input": "one", "target": "eine"})]
    assert [row.record.id for row in quarantined(workspace) if row.released] == ["s"]
    assert "no longer released" in temper("s", "--withdraw", "--why", "no")
    assert not [row for row in quarantined(workspace) if row.released]
    for words in (("s", "--release"), ("--release", "--why", "x"), ("none",), ("s", "--withdraw", "--why", "x")):
        temper(*words, code=65)
