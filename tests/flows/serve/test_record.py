from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.serve.errors import ApiError
from flows.serve.record import Conversation, Record
from flows.serve.requests import FeedbackRequest
from tasks.core.errors import BadParams
from tests.conftest import ROOT
from tests.helpers.commands import environment


def conversation(name: str, text: str = "Hello", **fields: Any) -> Conversation:
    values: dict[str, Any] = {
        "id": name,
        "key_name": "alice",
        "endpoint": "chat",
        "model": "m",
        "version": "m/1",
        "adapter": None,
        "route": "served",
        "prompt": [{"role": "user", "content": text}],
        "tools": (),
        "options": {"seed": 1},
        "answers": [{"role": "assistant", "content": "Hi", "finish_reason": "stop"}],
        "prompt_tokens": 3,
        "answer_tokens": 2,
        "first_token_s": 0.1,
        "seconds": 0.2,
        "user": "",
        "metadata": {},
    }
    return Conversation(**{**values, **fields})


def rows(file: Path, what: str) -> list[dict[str, Any]]:
    with sqlite3.connect(file) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"select * from {what}")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "said.db"


def test_what_is_recorded_is_masked(file: Path) -> None:
    secret = "sk-" + "a" * 24
    text = f"I am a@b.org, my key is {secret}"
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"to": "c@d.org"})}}
    record = Record(file)
    record.add(
        conversation(
            "1",
            text,
            user="e@f.org",
            metadata={"mail": "g@h.org"},
            answers=[{"content": text, "tool_calls": [call]}],
        )
    )
    record.say(FeedbackRequest(id="1", better=f"write to i@j.org with {secret}"), "alice")
    record.close()
    (row,), (said,) = rows(file, "conversations"), rows(file, "feedback")
    masked = "I am [email], my key is [secret]"
    assert json.loads(row["prompt"]) == [{"role": "user", "content": masked}]
    assert said["value"] == "write to [email] with [secret]"
    for path in file.parent.iterdir():
        assert b".org" not in path.read_bytes()
        assert secret.encode() not in path.read_bytes()


def test_the_file_is_for_its_owner_alone(file: Path) -> None:
    Record(file).close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_feedback_is_of_recorded_answers(file: Path) -> None:
    record = Record(file)
    record.add(conversation("1"))
    record.add(conversation("2"))
    record.add(conversation("3", "another question"))
    for said in ({"thumb": "up"}, {"better": "No"}, {"preferred_over": "2"}):
        record.say(FeedbackRequest.model_validate({"id": "1", **said}), "bob")
    found = [(row["id"], row["kind"], row["value"], row["key_name"]) for row in rows(file, "feedback")]
    assert found == [("1", "thumb", "up", "bob"), ("1", "better", "No", "bob"), ("1", "preferred_over", "2", "bob")]
    for said, status, param in (
        ({"id": "9", "thumb": "up"}, 404, "id"),
        ({"id": "1", "preferred_over": "9"}, 404, "preferred_over"),
        ({"id": "1", "preferred_over": "3"}, 400, "preferred_over"),
    ):
        with pytest.raises(ApiError) as caught:
            record.say(FeedbackRequest.model_validate(said), "bob")
        assert (caught.value.status, caught.value.param) == (status, param)
    assert len(rows(file, "feedback")) == 3


WRITER = """
import sys
from pathlib import Path
from flows.serve.record import Record
from flows.serve.requests import FeedbackRequest
from tests.flows.serve.test_record import conversation
record, number = Record(Path(sys.argv[1])), 0
while True:
    record.add(conversation(str(number)))
    record.say(FeedbackRequest(id=str(number), thumb="up"), "")
    print(number, flush=True)
    number += 1
"""


def test_kill_9_loses_nothing_that_was_acknowledged(file: Path) -> None:
    acknowledged: list[str] = []
    for kill_after in (1, 7):
        file.unlink(missing_ok=True)
        command = [sys.executable, "-c", WRITER, str(file)]
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged = [writer.stdout.readline().strip() for _ in range(kill_after)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += writer.stdout.read().split()
        record = Record(file)
        for number in acknowledged:
            record.say(FeedbackRequest(id=number, thumb="down"), "")
        record.close()
        thumbs = [row["id"] for row in rows(file, "feedback") if row["value"] == "up"]
        assert thumbs[: len(acknowledged)] == acknowledged
        (whole,) = rows(file, "pragma_integrity_check")
        assert list(whole.values()) == ["ok"]


def test_another_file_is_not_written_to(file: Path) -> None:
    file.write_text("a letter to somebody\n" * 100)
    with pytest.raises(BadParams, match="is no record of conversations"):
        Record(file)
    assert file.read_text() == "a letter to somebody\n" * 100


def test_a_record_of_a_later_temper_is_refused(file: Path) -> None:
    Record(file).close()
    with sqlite3.connect(file) as database:
        database.execute("pragma user_version = 7")
    with pytest.raises(BadParams, match="another version of temper"):
        Record(file)
