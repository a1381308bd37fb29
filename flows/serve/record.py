"""Conversations and what people say of them, in one SQLite file: what was acknowledged is on the disk.

Texts are masked before they are written, by the masks that repair rows of training data: e-mail addresses and secrets.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from flows.serve.errors import ApiError
from flows.serve.requests import FeedbackRequest
from tasks.core.errors import BadParams

SCHEMA = 1
MASKED = ("secrets", "emails")
"""Which repairs of validation every text goes through."""

_WAIT_S = 30
_TABLES = """
create table conversations (
    id text primary key, time real not null, key_name text not null, endpoint text not null,
    model text not null, version text not null, adapter text, route text not null,
    prompt text not null, tools text not null, options text not null, answers text not null,
    prompt_tokens integer not null, answer_tokens integer not null,
    first_token_s real, seconds real not null, user text not null, metadata text not null);
create table feedback (
    number integer primary key autoincrement, time real not null, key_name text not null,
    id text not null references conversations (id), kind text not null, value text not null);
create index feedback_id on feedback (id);
"""


class Conversation(NamedTuple):
    """A conversation that was answered.

    Attributes:
        id: of the response.
        key_name: the client's name; empty without keys.
        endpoint: chat or completions.
        route: served, canary or shadow: an answer of the last was seen by nobody.
        prompt: the turns as they were sent, or the prompts of completions.
        options: how the answers were generated, with the seed.
        answers: of each choice its message or text, and why it ended.
        first_token_s: until the first token was there; None where there is none.
        seconds: from the request to the end of the answer.
    """

    id: str
    key_name: str
    endpoint: str
    model: str
    version: str
    adapter: str | None
    route: str
    prompt: Sequence[Any]
    tools: Sequence[str]
    options: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]
    prompt_tokens: int
    answer_tokens: int
    first_token_s: float | None
    seconds: float
    user: str
    metadata: Mapping[str, str]


def masked(value: Any) -> Any:
    """Return a JSON value with every text in it masked."""
    from tasks.validate.repairs import REPAIRS

    if isinstance(value, str):
        for name in MASKED:
            value = REPAIRS[name](value)
        return value
    if isinstance(value, Mapping):
        return {masked(name): masked(each) for name, each in value.items()}
    return [masked(each) for each in value] if isinstance(value, list | tuple) else value


class Record:
    """The file; several threads may use it.

    Raises:
        BadParams: the file is something else, or of another version of temper.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        try:
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # what people say is nobody else's to read
            self._open()
        except (OSError, sqlite3.DatabaseError) as error:
            raise BadParams("is no record of conversations", where=str(file), got=str(error)) from error

    def _open(self) -> None:
        self._database = sqlite3.connect(self._file, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        self._database.execute("pragma journal_mode = wal")
        self._database.execute("pragma synchronous = full")  # a commit is on the disk when it returns
        self._database.execute("pragma foreign_keys = on")
        self._database.execute("begin immediate")
        (version,) = self._database.execute("pragma user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, _TABLES.split(";")):
                self._database.execute(statement)
            self._database.execute(f"pragma user_version = {SCHEMA}")
        self._database.execute("commit")
        if version not in (0, SCHEMA):
            raise BadParams("is of another version of temper", where=str(self._file), got=f"schema {version}")

    def add(self, conversation: Conversation) -> None:
        """Write a conversation; when this returns it is on the disk."""
        row = {
            name: value if isinstance(value, str | int | float | None) else _json(masked(value))
            for name, value in conversation._asdict().items()
        }
        row |= {"time": time.time(), "user": masked(conversation.user)}
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        with self._lock:
            self._database.execute(f"insert into conversations ({names}) values ({values})", row)  # noqa: S608  # own names

    def say(self, said: FeedbackRequest, key_name: str) -> None:
        """Write what somebody says of an answer; when this returns it is on the disk.

        Raises:
            ApiError: no such answer was recorded, or the two that are compared answer different things.
        """
        asked = self._asked(said.id, "id")
        if said.preferred_over and self._asked(said.preferred_over, "preferred_over") != asked:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "preferred_over: the two answers are to different conversations",
                param="preferred_over",
                code="invalid_value",
            )
        kind, value = next((name, getattr(said, name)) for name in _KINDS if getattr(said, name) is not None)
        row = (time.time(), key_name, said.id, kind, masked(value) if kind == "better" else value)
        with self._lock:
            self._database.execute("insert into feedback (time, key_name, id, kind, value) values (?, ?, ?, ?, ?)", row)

    def _asked(self, name: str, param: str) -> tuple[str, str]:
        with self._lock:
            found = self._database.execute("select prompt, tools from conversations where id = ?", (name,)).fetchone()
        if found is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"{param}: no answer with this id was recorded", param=param, code="not_found"
            )
        return found  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()


_KINDS = ("thumb", "better", "preferred_over")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
