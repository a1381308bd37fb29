"""Conversations and what people say of them, in SQLite or PostgreSQL: what was acknowledged is on the disk.

Texts are masked before they are written, by the masks that repair rows of training data: e-mail addresses and secrets.

Who writes opens it with `write=True`, which makes it where there is none; who reads does not, and changes nothing:

    with closing(open_record("said.db")) as record:            # or a URL, or what `url_given` returns
        for vote in record.votes(since=yesterday): ...         # thumbs, better answers, preferred ones
        for said in record.conversations(since=yesterday): ... # the oldest first, a page at a time
        record.conversation(vote.id)                           # one, or None

Times are seconds since 1970. What is read is not masked again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    TypeDecorator,
    delete,
    func,
    insert,
    select,
    tuple_,
    union,
)

from flows.serve.errors import ApiError
from flows.serve.record_database import Database, url_of
from flows.serve.requests import FeedbackRequest

SCHEMA = 1
MASKED = ("secrets", "emails")
"""Which repairs of validation every text goes through."""

_PAGE = 500
"""So many rows are read at a time, so that a long reading holds up no writer."""


class _Json(TypeDecorator[Any]):
    """A value of JSON as text, which SQLite and PostgreSQL give back as it was written."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    def process_result_value(self, value: str | None, dialect: object) -> Any:
        return json.loads(value or "null")


_TABLES = MetaData()
_CONVERSATIONS = Table(
    "conversations",
    _TABLES,
    Column("id", Text, primary_key=True),
    Column("time", Double, nullable=False),
    Column("key_name", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("adapter", Text),
    Column("route", Text, nullable=False),
    Column("prompt", _Json, nullable=False),
    Column("tools", _Json, nullable=False),
    Column("options", _Json, nullable=False),
    Column("answers", _Json, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("answer_tokens", Integer, nullable=False),
    Column("first_token_s", Double),
    Column("seconds", Double, nullable=False),
    Column("user", Text, nullable=False),
    Column("metadata", _Json, nullable=False),
)
_FEEDBACK = Table(
    "feedback",
    _TABLES,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("time", Double, nullable=False),
    Column("key_name", Text, nullable=False),
    Column("id", Text, ForeignKey(_CONVERSATIONS.c.id), nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Text, nullable=False),
    Index("feedback_id", "id"),
    sqlite_autoincrement=True,  # a number is never given again
)


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
        time: when it was recorded, which `Record.add` says.
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
    time: float = 0.0


class Vote(NamedTuple):
    """What a client said of an answer.

    Attributes:
        number: rises with what is recorded; two that are written at once may become visible in either order.
        time: when it was recorded.
        key_name: the client's name; empty without keys.
        id: of the answer.
        kind: thumb, better or preferred_over.
        value: up or down, the better answer, or the id of the answer that was not preferred.
    """

    number: int
    time: float
    key_name: str
    id: str
    kind: str
    value: str


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


def open_record(place: str | Path | URL, *, write: bool = False) -> Record:
    """Open the record in a file or at a URL; close it in the end.

    Args:
        place: a file, sqlite:///FILE, postgresql://USER@HOST/DATABASE, or what `url_given` returns.
        write: whether it is written to, and made where there is none.

    Raises:
        BadParams: something else is there, of another version of temper, or a driver is missing.
        Transient: the database does not answer.
    """
    return Record(place, write=write)


class Record:
    """Conversations and votes in a database; several threads and processes may use them.

    Every method raises `Transient` where the database does not answer.
    """

    def __init__(self, place: str | Path | URL, *, write: bool = True) -> None:
        self._database = Database(url_of(place), _TABLES, SCHEMA, write=write)

    @property
    def url(self) -> URL:
        """Return where it is, for whoever opens it again; it may hold a password."""
        return self._database.url

    @property
    def place(self) -> str:
        """Where it is: a file's path, or server and database without user and password."""
        return self._database.place

    def add(self, conversation: Conversation) -> None:
        """Write a conversation; when this returns it is on the disk."""
        said = {name: masked(getattr(conversation, name)) for name in _MASKED_FIELDS}
        with self._database.transaction() as connection:
            connection.execute(insert(_CONVERSATIONS), {**conversation._asdict(), **said, "time": time.time()})

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
        row = {
            "time": time.time(),
            "key_name": key_name,
            "id": said.id,
            "kind": kind,
            "value": masked(value) if kind == "better" else value,
        }
        with self._database.transaction() as connection:
            connection.execute(insert(_FEEDBACK), row)

    def _asked(self, name: str, param: str) -> tuple[Any, Any]:
        found = self.conversation(name)
        if found is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"{param}: no answer with this id was recorded", param=param, code="not_found"
            )
        return found.prompt, found.tools

    def conversation(self, name: str) -> Conversation | None:
        """Return the conversation with this id, if it was recorded."""
        with self._database.transaction() as connection:
            row = connection.execute(_conversations().where(_CONVERSATIONS.c.id == name)).one_or_none()
        return None if row is None else Conversation(*row)

    def conversations(
        self, since: float | None = None, until: float | None = None, *, voted: bool = False
    ) -> Iterator[Conversation]:
        """Yield conversations, the oldest first; those of every route, shadow's too.

        Args:
            since: recorded then or later, in seconds since 1970.
            until: recorded before.
            voted: only those of which somebody said something, be it that another was preferred.
        """
        columns = _CONVERSATIONS.c
        asked = _within(_conversations(), columns.time, since, until).order_by(columns.time, columns.id).limit(_PAGE)
        if voted:
            compared = select(_FEEDBACK.c.value).where(_FEEDBACK.c.kind == "preferred_over")
            asked = asked.where(columns.id.in_(union(select(_FEEDBACK.c.id), compared)))
        last = None
        while True:
            beyond = asked if last is None else asked.where(tuple_(columns.time, columns.id) > last)
            page = [Conversation(*row) for row in self._read(beyond)]
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1].time, page[-1].id

    def votes(self, since: float | None = None, until: float | None = None) -> Iterator[Vote]:
        """Yield all that was said, in the order of its numbers; of a client's votes on an answer the last one counts.

        Args:
            since: recorded then or later, in seconds since 1970.
            until: recorded before.
        """
        asked = _within(select(_FEEDBACK), _FEEDBACK.c.time, since, until).order_by(_FEEDBACK.c.number).limit(_PAGE)
        last = 0
        while page := [Vote(*row) for row in self._read(asked.where(_FEEDBACK.c.number > last))]:
            yield from page
            last = page[-1].number

    def newest(self) -> int:
        """Return the number of the newest vote; 0 where there is none."""
        with self._database.transaction() as connection:
            return connection.execute(select(func.max(_FEEDBACK.c.number))).scalar_one() or 0

    def forget(self, before: float) -> int:
        """Delete conversations that were recorded before a time, with what was said of them; return how many."""
        old = _CONVERSATIONS.c.time < before
        with self._database.transaction() as connection:
            connection.execute(delete(_FEEDBACK).where(_FEEDBACK.c.id.in_(select(_CONVERSATIONS.c.id).where(old))))
            return connection.execute(delete(_CONVERSATIONS).where(old)).rowcount

    def _read(self, asked: Select[Any]) -> Sequence[Row[Any]]:
        with self._database.transaction() as connection:
            return connection.execute(asked).all()

    def close(self) -> None:
        """Close the connections."""
        self._database.close()


_KINDS = ("thumb", "better", "preferred_over")
_MASKED_FIELDS = ("prompt", "tools", "options", "answers", "user", "metadata")


def _conversations() -> Select[Any]:
    return select(*(_CONVERSATIONS.c[name] for name in Conversation._fields))


def _within(asked: Select[Any], when: Column[float], since: float | None, until: float | None) -> Select[Any]:
    if since is not None:
        asked = asked.where(when >= since)
    return asked if until is None else asked.where(when < until)
