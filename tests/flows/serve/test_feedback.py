"""What people said of answers, read back by the stage that reads all rows."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.serve.feedback import Choice, forget, snapshot
from flows.serve.record import open_record
from flows.serve.requests import FeedbackRequest
from tasks.core.errors import BadData, BadParams
from tasks.core.records import ChatExample, LabelledReply, Message, PreferencePair
from tasks.ingest.params import FolderSource
from tasks.ingest.stage import Reading
from tests.flows.serve.test_record import conversation

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "said.db"


def told(file: Path, conversations: dict[str, str], votes: list[tuple[str, dict[str, Any]]], **fields: Any) -> None:
    """Record answers to one question, and what clients say of them."""
    record = open_record(file, write=True)
    for name, text in conversations.items():
        answers = [{"role": "assistant", "content": text, "finish_reason": "stop", "refusal": None}]
        record.add(conversation(name, prompt=ASKED, answers=answers, **fields))
    for client, said in votes:
        record.say(FeedbackRequest.model_validate(said), client)
    record.close()


def read(folder: Path) -> list[Any]:
    reading = Reading("said", FolderSource(kind="folder", path=str(folder), glob="*.jsonl"))
    rows = list(reading.records())
    assert not reading.refused
    return rows


def test_votes_become_rows_of_every_kind(file: Path, tmp_path: Path) -> None:
    told(
        file,
        {"a": "Four.", "b": "Five.", "c": "4", "d": "22"},
        [
            ("ann", {"id": "a", "thumb": "up"}),
            ("ann", {"id": "b", "thumb": "down"}),
            ("bob", {"id": "b", "thumb": "down"}),
            ("ann", {"id": "b", "better": "It is four."}),
            ("bob", {"id": "c", "preferred_over": "d"}),
            ("ann", {"id": "c", "preferred_over": "d"}),
        ],
    )
    found = snapshot(file, tmp_path / "rows")
    assert found.counts() == {"chats.jsonl": 1, "labels.jsonl": 2, "preferences.jsonl": 2}
    assert not found.left_out
    rows = read(tmp_path / "rows")
    prompt = (Message("system", "Be kind."), Message("user", "What is 2 plus 2?"))
    chats = [row for row in rows if isinstance(row, ChatExample)]
    assert [row.messages for row in chats] == [(*prompt, Message("assistant", "It is four."))]
    pairs = [(row.prompt, row.chosen, row.rejected) for row in rows if isinstance(row, PreferencePair)]
    assert pairs == [(prompt, "It is four.", "Five."), (prompt, "4", "22")]
    labels = [(row.prompt, row.reply, row.label) for row in rows if isinstance(row, LabelledReply)]
    assert labels == [(prompt, "Four.", True), (prompt, "Five.", False)]


def test_the_last_vote_of_a_client_counts_and_even_ones_make_no_row(file: Path, tmp_path: Path) -> None:
    told(
        file,
        {"a": "Four.", "b": "Five.", "c": "4"},
        [
            ("ann", {"id": "a", "thumb": "down"}),
            ("ann", {"id": "a", "thumb": "up"}),
            ("ann", {"id": "b", "thumb": "down"}),
            ("bob", {"id": "b", "thumb": "up"}),
            ("ann", {"id": "c", "better": "4"}),
        ],
    )
    found = snapshot(file, tmp_path / "rows")
    assert found.counts() == {"chats.jsonl": 1, "labels.jsonl": 1}
    assert found.left_out == {"as many up as down": 1, "the better answer is the same": 1}
    (line,) = (tmp_path / "rows" / "labels.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": [*ASKED, {"role": "assistant", "content": "Four."}], "label": True}


def test_only_what_may_be_used_is_taken_and_the_rest_can_be_deleted(file: Path, tmp_path: Path) -> None:
    yes: list[tuple[str, dict[str, Any]]] = [("ann", {"id": "a", "thumb": "up"})]
    told(file, {"a": "Four."}, yes, metadata={"training": "yes"})
    told(file, {"b": "Five."}, [("ann", {"id": "b", "thumb": "down"})])
    told(file, {"c": "4"}, [("ann", {"id": "c", "thumb": "up"})], metadata={"training": "yes"})
    with sqlite3.connect(file) as database:
        database.execute("update conversations set time = ? where id = 'c'", (time.time() - 40 * 86_400,))
    database.close()
    found = snapshot(file, tmp_path / "rows", Choice(days=30, consent={"training": "yes"}))
    assert found.counts() == {"labels.jsonl": 1}
    assert found.left_out == {"older than is wanted": 1, "without consent": 1}
    before = (tmp_path / "rows" / "labels.jsonl").read_bytes()
    assert forget(file, 30) == 1
    assert b'"4"' not in file.read_bytes()
    assert snapshot(file, tmp_path / "rows").counts() == {"labels.jsonl": 2}
    assert (tmp_path / "rows" / "labels.jsonl").read_bytes().startswith(before)


def test_what_is_no_record_leaves_the_rows_as_they_were(file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "labels.jsonl").write_text("kept")
    file.write_text("no database")
    with pytest.raises(BadParams, match="is no record of conversations"):
        snapshot(file, tmp_path / "rows")
    with pytest.raises(BadParams, match="is no record of conversations"):
        snapshot(tmp_path / "nowhere.db", tmp_path / "rows")
    assert not (tmp_path / "nowhere.db").exists()
    file.unlink()
    told(file, {"a": "Four."}, [])
    with pytest.raises(BadData, match="holds nothing to train on"):
        snapshot(file, tmp_path / "rows")
    assert (tmp_path / "rows" / "labels.jsonl").read_text() == "kept"


def test_a_folder_of_something_else_is_not_replaced(file: Path, tmp_path: Path) -> None:
    told(file, {"a": "Four."}, [("ann", {"id": "a", "thumb": "up"})])
    with pytest.raises(BadData, match="would be replaced"):
        snapshot(file, tmp_path)
    assert file.exists()


def test_the_command_says_what_it_wrote(file: Path, tmp_path: Path) -> None:
    told(file, {"a": "Four."}, [("ann", {"id": "a", "thumb": "up"})])
    done = CliRunner().invoke(app, ["feedback", str(file), str(tmp_path / "some rows"), "--forget-after", "30"])
    assert done.exit_code == 0, done.output
    assert "0 conversations deleted" in done.output
    assert "labels.jsonl: 1 rows" in done.output.replace("\n", "")
