from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from flows.serve.errors import ApiError
from flows.serve.record import Conversation, open_record
from flows.serve.record_database import shown, url_given, url_of
from flows.serve.requests import FeedbackRequest
from tasks.core.errors import BadParams, Transient
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.postgresql import PASSWORD, Cluster


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


def rows(place: URL, what: str) -> list[dict[str, Any]]:
    engine = create_engine(place)
    with engine.connect() as connection:
        found = [dict(row) for row in connection.execute(text(f"select * from {what}")).mappings()]
    engine.dispose()
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "said.db"


def test_what_is_recorded_is_masked(place: URL) -> None:
    secret = "sk-" + "a" * 24
    words = f"I am a@b.org, my key is {secret}"
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"to": "c@d.org"})}}
    record = open_record(place, write=True)
    record.add(
        conversation(
            "1",
            words,
            user="e@f.org",
            metadata={"mail": "g@h.org"},
            answers=[{"content": words, "tool_calls": [call]}],
        )
    )
    record.say(FeedbackRequest(id="1", better=f"write to i@j.org with {secret}"), "alice")
    record.close()
    (row,), (said,) = rows(place, "conversations"), rows(place, "feedback")
    masked = "I am [email], my key is [secret]"
    assert json.loads(row["prompt"]) == [{"role": "user", "content": masked}]
    assert said["value"] == "write to [email] with [secret]"
    assert ".org" not in str(row)
    assert secret not in str(row)


def test_masked_texts_are_in_no_file(file: Path) -> None:
    with closing(open_record(file, write=True)) as record:
        record.add(conversation("1", "I am a@b.org"))
        record.say(FeedbackRequest(id="1", better="write to i@j.org"), "alice")
        for path in file.parent.iterdir():
            assert b".org" not in path.read_bytes()


def test_the_file_is_for_its_owner_alone(file: Path) -> None:
    open_record(file, write=True).close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_feedback_is_of_recorded_answers(place: URL) -> None:
    record = open_record(place, write=True)
    record.add(conversation("1"))
    record.add(conversation("2"))
    record.add(conversation("3", "another question"))
    for said in ({"thumb": "up"}, {"better": "No"}, {"preferred_over": "2"}):
        record.say(FeedbackRequest.model_validate({"id": "1", **said}), "bob")
    found = [(vote.id, vote.kind, vote.value, vote.key_name) for vote in record.votes()]
    assert found == [("1", "thumb", "up", "bob"), ("1", "better", "No", "bob"), ("1", "preferred_over", "2", "bob")]
    for said, status, param in (
        ({"id": "9", "thumb": "up"}, 404, "id"),
        ({"id": "1", "preferred_over": "9"}, 404, "preferred_over"),
        ({"id": "1", "preferred_over": "3"}, 400, "preferred_over"),
    ):
        with pytest.raises(ApiError) as caught:
            record.say(FeedbackRequest.model_validate(said), "bob")
        assert (caught.value.status, caught.value.param) == (status, param)
    assert len(list(record.votes())) == 3
    record.close()


def test_what_is_read_is_what_was_written(place: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.serve.record._PAGE", 2)  # so that there are several
    written = [
        conversation(str(number), f"数据 \x00 {number}", adapter=None if number % 2 else "one", metadata={"a": "b"})
        for number in range(5)
    ]
    with closing(open_record(place, write=True)) as record:
        for each in written:
            record.add(each)
            record.say(FeedbackRequest(id=each.id, thumb="up"), "bob")
        record.say(FeedbackRequest(id="0", thumb="down"), "bob")
    with closing(open_record(place)) as record:
        found = list(record.conversations())
        assert [each._replace(time=0.0, tools=()) for each in found] == written
        assert record.conversation("3") == found[3]
        assert record.conversation("9") is None
        votes = list(record.votes())
        assert [(vote.id, vote.value) for vote in votes] == [*((str(n), "up") for n in range(5)), ("0", "down")]
        # a time is that of one row at least, and each row is on one side of it
        middle = found[2].time
        parts = [list(record.conversations(until=middle)), list(record.conversations(since=middle))]
        assert [each for part in parts for each in part] == found
        assert parts[1][0] == found[2]
        assert [vote for part in ((None, middle), (middle, None)) for vote in record.votes(*part)] == votes


def test_conversations_of_which_somebody_said_something(place: URL) -> None:
    with closing(open_record(place, write=True)) as record:
        for name in "abcd":
            record.add(conversation(name))
        record.say(FeedbackRequest(id="b", preferred_over="d"), "")
        record.say(FeedbackRequest(id="b", better="a"), "")  # a text, which is also the name of an answer
        assert [each.id for each in record.conversations(voted=True)] == ["b", "d"]


def test_what_is_old_is_forgotten_with_what_was_said_of_it(place: URL) -> None:
    with closing(open_record(place, write=True)) as record:
        for name in "abc":
            record.add(conversation(name))
            record.say(FeedbackRequest(id=name, thumb="up"), "")
        assert record.forget(list(record.conversations())[2].time) == 2
        assert [each.id for each in record.conversations()] == ["c"]
        assert [vote.id for vote in record.votes()] == ["c"]
        assert [vote.number for vote in record.votes()] == [3]


def test_a_reader_writes_nothing_and_makes_nothing(place: URL) -> None:
    with pytest.raises(BadParams, match="is no record of conversations"):
        open_record(place)
    open_record(place, write=True).close()
    with closing(open_record(place)) as record, pytest.raises(Transient):
        record.add(conversation("1"))
    assert not rows(place, "conversations")


def test_several_threads_write_and_read_at_once(place: URL) -> None:
    with closing(open_record(place, write=True)) as record:

        def work(number: int) -> None:
            record.add(conversation(str(number)))
            record.say(FeedbackRequest(id=str(number), thumb="up"), "")
            assert len(list(record.votes())) >= 1

        with ThreadPoolExecutor(12) as threads:
            list(threads.map(work, range(60)))
        assert sorted(int(each.id) for each in record.conversations()) == list(range(60))
        assert len(list(record.votes())) == 60


def test_two_that_begin_at_once_make_one_record(place: URL) -> None:
    with ThreadPoolExecutor(4) as threads:
        for record in list(threads.map(lambda _: open_record(place, write=True), range(4))):
            record.close()
    assert not rows(place, "conversations")


WRITER = """
import sys
from flows.serve.record import open_record
from flows.serve.record_database import url_given
from flows.serve.requests import FeedbackRequest
from tests.flows.serve.test_record import conversation
record, number = open_record(url_given(None), write=True), int(sys.argv[1])
while True:
    record.add(conversation(str(number)))
    record.say(FeedbackRequest(id=str(number), thumb="up"), "")
    print(number, flush=True)
    number += 1
"""


def acknowledged(place: URL, first: int, count: int, kill: Callable[[int], None]) -> list[str]:
    """What a writer said that it had recorded, until a kill after so many."""
    variables = environment(TEMPER_RECORD=place.render_as_string(hide_password=False))
    command = [sys.executable, "-c", WRITER, str(first)]
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline().strip() for _ in range(count)]
        kill(writer.pid)
        said += writer.stdout.read().split()
    return said


def test_kill_9_loses_nothing_that_was_acknowledged(place: URL) -> None:
    for first, kill_after in ((0, 1), (1000, 7)):
        numbers = acknowledged(place, first, kill_after, lambda pid: os.kill(pid, signal.SIGKILL))
        with closing(open_record(place, write=True)) as record:
            found = [vote.id for vote in record.votes() if int(vote.id) >= first]
            assert found[: len(numbers)] == numbers
            for number in numbers:
                assert record.conversation(number) is not None
    if place.get_backend_name() == "sqlite":
        (whole,) = rows(place, "pragma_integrity_check")
        assert list(whole.values()) == ["ok"]


def test_a_server_that_loses_its_power_loses_nothing_that_was_acknowledged(postgresql: Cluster) -> None:
    place = postgresql.database()
    engine = create_engine(place.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # a commit of which nobody would wait for the disk
        connection.execute(text(f"alter database {place.database} set synchronous_commit = off"))
    engine.dispose()
    with closing(open_record(place, write=True)) as record:
        numbers = acknowledged(place, 0, 20, lambda _: postgresql.kill())
        with pytest.raises(Transient) as caught:
            list(record.votes())
        assert PASSWORD not in str(caught.value)
        postgresql.begin()
        assert [vote.id for vote in record.votes()][: len(numbers)] == numbers  # by the same record: it connects anew


def test_another_file_is_not_written_to(file: Path) -> None:
    file.write_text("a letter to somebody\n" * 100)
    with pytest.raises(BadParams, match="is no record of conversations"):
        open_record(file, write=True)
    assert file.read_text() == "a letter to somebody\n" * 100


def test_tables_of_another_program_are_left_alone(place: URL) -> None:
    engine = create_engine(place)
    with engine.begin() as connection:
        connection.execute(text("create table feedback (stars integer)"))
    engine.dispose()
    for write in (True, False):
        with pytest.raises(BadParams, match="is no record of conversations"):
            open_record(place, write=write)
    assert rows(place, "feedback") == []
    with pytest.raises(SQLAlchemyError):
        rows(place, "conversations")


def test_a_record_of_a_later_temper_is_refused(place: URL) -> None:
    open_record(place, write=True).close()
    engine = create_engine(place)
    with engine.begin() as connection:
        sqlite = place.get_backend_name() == "sqlite"
        connection.execute(text("pragma user_version = 7" if sqlite else "update temper_record set schema = 7"))
    engine.dispose()
    with pytest.raises(BadParams, match="another version of temper"):
        open_record(place, write=True)


def test_a_file_is_named_by_a_path_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("said.db", "sqlite:///said.db", f"sqlite:///{tmp_path}/said.db"):
        url = url_given(name)
        assert url is not None
        assert shown(url) == str(tmp_path / "said.db")
    assert url_given(None) is None
    monkeypatch.setenv("TEMPER_RECORD", "other.db")
    assert shown(url_of(str(url_given(None)))) == str(tmp_path / "other.db")
    assert url_given("said.db") == url_of(tmp_path / "said.db")


@pytest.mark.parametrize(
    "place",
    [
        "mysql://ann:secret-word@h/d",
        "sqlite://",
        "sqlite:///said.db?mode=memory",
        "postgresql+asyncpg://ann:secret-word@h/d",
        "postgresql://ann:secret-word@h:port/d",
        "nothing://ann:secret-word@h/d",
    ],
)
def test_what_is_no_place_of_a_record(place: str) -> None:
    with pytest.raises(BadParams, match="is no URL of a record") as caught:
        url_of(place)
    assert "secret-word" not in str(caught.value)


def test_a_password_is_in_no_command_line_and_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("postgresql://ann:secret-word@127.0.0.1:1/d", "postgresql://127.0.0.1:1/d?password=secret-word"):
        with pytest.raises(BadParams, match="password in a command line") as caught:
            url_given(place)
        assert "secret-word" not in str(caught.value)
        monkeypatch.setenv("TEMPER_RECORD", place)
        pytest.importorskip("psycopg2")
        with pytest.raises(Transient, match="does not answer") as unreachable:
            open_record(url_given(None) or "")
        assert "postgresql://127.0.0.1:1/d" in str(unreachable.value)
        assert "secret-word" not in str(unreachable.value)


def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(BadParams, match="driver that is not installed") as caught:
        open_record("postgresql://ann:secret-word@h/d", write=True)
    assert caught.value.fix == "pip install psycopg2-binary"
    assert "secret-word" not in str(caught.value)
