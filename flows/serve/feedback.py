"""What people said of answers, as rows to train on: a snapshot of the record in files that `ingest` reads.

    labels.jsonl        a thumb: {messages, label}
    preferences.jsonl   a better answer, or the preferred one of two: {prompt, chosen, rejected}
    chats.jsonl         a better answer by itself: {messages}

The record goes on while it is read; the files do not change by themselves, so that DVC can say what a training saw.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import URL

from flows.serve.record import Conversation, Record, Vote, open_record
from flows.serve.recorded import DAY_S, EVALUATION, last_votes
from tasks.core.artifacts import MANIFEST, atomic_folder
from tasks.core.errors import BadData
from tasks.ingest.feedback import FILES

_TURN = ("role", "content", "tool_calls", "tool_call_id", "name")
"""What a turn of a row has; the rest of a message, such as why it ended, is of the response."""


class Choice(NamedTuple):
    """Which conversations are taken, and as what.

    Attributes:
        days: not older than so many; None: all.
        consent: keys and values that the request's `metadata` must have; none: all.
        rows: of these kinds, as `FILES` names them.
    """

    days: float | None = None
    consent: Mapping[str, str] = MappingProxyType({})
    rows: Sequence[str] = tuple(FILES)


class Found(NamedTuple):
    """What a record says: lines of rows by file, the oldest first, and votes that made none by the reason."""

    lines: Mapping[str, Sequence[str]]
    left_out: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """Count the rows of each file."""
        return {name: len(lines) for name, lines in self.lines.items()}

    def new(self, folder: Path) -> int:
        """Count the rows that a snapshot does not have; all where there is none."""
        had: dict[str, set[str]] = {}
        for name in self.lines:
            file = folder / name
            had[name] = set(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else set()
        return sum(line not in had[name] for name, lines in self.lines.items() for line in lines)


def find(record: Record, choice: Choice | None = None) -> Found:
    """Find the rows in a record.

    Of several votes that a client gave on one answer the last one counts. Thumbs of several clients are one row, with
    what more of them say; where they are even there is none. Equal rows are one.
    """
    choice, left_out = choice or Choice(), Counter[str]()
    files: dict[str, dict[str, None]] = {}
    votes = last_votes(record.votes())  # first: what they are of is there by now
    conversations = dict(_chosen(record, choice, left_out))
    wanted = {FILES[kind] for kind in choice.rows}
    for name, row in _rows(conversations, votes, left_out):
        if name in wanted:
            files.setdefault(name, {})[json.dumps(row, ensure_ascii=False)] = None
    return Found({name: list(lines) for name, lines in sorted(files.items())}, left_out)


def write(found: Found, out: Path, about: dict[str, Any] | None = None) -> None:
    """Write rows to a folder, whole or not at all.

    Args:
        found: the rows.
        out: the folder.
        about: what its manifest says besides.

    Raises:
        BadData: the folder holds something else.
    """
    _check_folder(out)
    with atomic_folder(out, about) as folder:
        for name, lines in found.lines.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def snapshot(place: str | Path | URL, out: Path, choice: Choice | None = None) -> Found:
    """Write the rows that the record of `temper serve` holds to a folder.

    Raises:
        BadData: there is no row to write, or the folder holds something else.
        BadParams: there is no record.
    """
    _check_folder(out)
    with closing(open_record(place)) as record:
        found = find(record, choice)
        if not found.lines:
            raise BadData(
                "holds nothing to train on",
                where=record.place,
                examples=[f"{reason}: {count}" for reason, count in sorted(found.left_out.items())],
                expected="feedback on answers",
            )
    write(found, out)
    return found


def _check_folder(out: Path) -> None:
    """Refuse to replace what is no snapshot."""
    others = (
        [each.name for each in out.iterdir() if each.name not in (*FILES.values(), MANIFEST)] if out.is_dir() else []
    )
    if others or (out.exists() and not out.is_dir()):
        raise BadData(
            "is no folder of feedback, and would be replaced",
            where=str(out),
            examples=others,
            fix="name a new folder, or one that `temper feedback` wrote",
        )


def forget(place: str | Path | URL, days: float) -> int:
    """Delete conversations older than so many days, with what was said of them; return how many.

    Raises:
        BadParams: there is no record.
    """
    with closing(open_record(place)):
        pass  # what is no record is not made one
    with closing(open_record(place, write=True)) as record:
        return record.forget(time.time() - days * DAY_S)


class _Answered(NamedTuple):
    """One answer of a chat: the turns before it, itself as a turn, and what rows of it say of tools."""

    prompt: list[dict[str, Any]]
    answer: dict[str, Any]
    tools: dict[str, list[Any]]


def _chosen(record: Record, choice: Choice, left_out: Counter[str]) -> Iterator[tuple[str, _Answered]]:
    """Yield the conversations that may be taken with their ids, the oldest first."""
    after = 0.0 if choice.days is None else time.time() - choice.days * DAY_S
    for each in record.conversations(voted=True):
        if each.time < after:
            left_out["older than is wanted"] += 1
        elif any(each.metadata.get(key) != value for key, value in choice.consent.items()):
            left_out["without consent"] += 1
        elif each.endpoint == EVALUATION:
            left_out["an item that models are evaluated with"] += 1
        elif each.endpoint != "chat":
            left_out["no chat"] += 1
        elif len(each.answers) != 1:
            left_out["several answers under one id"] += 1
        else:
            yield each.id, _answered(each)


def _answered(said: Conversation) -> _Answered:
    tools = [json.loads(tool) for tool in said.tools]
    turns = [_turn(message) for message in (*said.prompt, *said.answers)]
    return _Answered(turns[:-1], turns[-1], {"tools": tools} if tools else {})


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: message[name] for name in _TURN if message.get(name) is not None}


def _rows(
    conversations: Mapping[str, _Answered], votes: Iterable[Vote], left_out: Counter[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows with their files' names."""
    thumbs = Counter[str]()
    for vote in votes:
        name, value = vote.id, vote.value
        if name not in conversations:
            continue  # why is counted already
        said = conversations[name]
        text = said.answer.get("content")
        if vote.kind == "thumb":
            thumbs[name] += 1 if value == "up" else -1
        elif vote.kind == "better":
            yield FILES["chats"], {"messages": [*said.prompt, {"role": "assistant", "content": value}], **said.tools}
            yield from _pair(said, value, text, left_out)
        elif value in conversations:
            yield from _pair(said, text, conversations[value].answer.get("content"), left_out)
    for name, up in thumbs.items():
        said = conversations[name]
        if up:
            yield FILES["labels"], {"messages": [*said.prompt, said.answer], "label": up > 0, **said.tools}
        else:
            left_out["as many up as down"] += 1


def _pair(
    said: _Answered, chosen: str | None, rejected: str | None, left_out: Counter[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not chosen or not rejected:
        left_out["an answer without text"] += 1
    elif chosen == rejected:
        left_out["the better answer is the same"] += 1
    else:
        yield FILES["preferences"], {"prompt": said.prompt, "chosen": chosen, "rejected": rejected, **said.tools}
