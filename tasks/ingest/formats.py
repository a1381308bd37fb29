"""From a row as people write it to a row of ours: every common form of chats, preferences, labels, pairs and texts.

`detect` tells the format by a row's keys; `FORMATS` has a function for each. All of them are pure, and refuse what they
cannot keep whole.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Mapping, Sequence
from typing import Any

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, LabelledReply, Record, written_out
from tasks.ingest.parsers import (
    INPUT_TARGET,
    PROMPT_REPLY,
    Origin,
    language_of,
    parse_alpaca,
    parse_choices,
    parse_conversations,
    parse_pair,
    parse_preference,
    parse_prompt_reply,
    parse_prompt_text,
    parse_ranked,
    parse_seed_tasks,
    parse_text,
)
from tasks.ingest.remarks import NotRead, remark
from tasks.ingest.turns import RawRow


def parse(row: Any, form: str | Mapping[str, str], origin: Origin) -> Sequence[Record]:
    """Parse one row of a file into records.

    Args:
        row: what the file holds there.
        form: a key of `FORMATS`, or a mapping of our fields (prompt, reply, system, chosen, rejected, label, text,
            input, target) onto the file's columns.
        origin: where it came from.

    Returns:
        One record; several for a row that ranks or lists more than two replies.

    Raises:
        BadData: the row is not of that format, or holds what would be lost.
    """
    if isinstance(row, list):
        remark("a row is a list of turns, taken as its messages")
    row = _as_object(row, origin.place)
    if any(row.get(key) for key in ("image", "images", "audio", "audios", "video", "videos")):
        raise BadData("holds pictures or sound, which temper does not train on", where=origin.place)
    if isinstance(form, Mapping):
        row, form = _renamed(row, form, origin.place)
    read = _Reading(row)
    records = FORMATS[form](read, origin)
    for key in row.keys() - read.keys_read:
        if row[key] not in (None, "", [], {}):
            remark(NotRead(f'the column "{key}" is not read'))
    return records


class _Reading(dict[str, Any]):
    """A row that knows which of its columns were looked at."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # of a class that is dict's alone
        self.keys_read.update(self)
        return super().items()


def detect(row: Any, place: str) -> str:
    """Detect the format of a row by its keys.

    Raises:
        BadData: no format has such keys.
    """
    row = _as_object(row, place)
    for form, is_it in _SIGNS.items():
        if is_it(row):
            return form
    if "input_ids" in row:
        raise BadData(
            "holds token ids; temper renders texts itself", where=place, fix="give the rows before they were tokenised"
        )
    raise BadData(
        "is of no known format",
        where=place,
        got=f"the fields {', '.join(map(str, row)) or '(none)'}"[:300],
        expected=", ".join(FORMATS),
        fix="say in the source's `format` which column is what, such as {prompt: Question, reply: Answer}",
    )


def _as_object(row: Any, place: str) -> RawRow:
    """Return a row as an object; one that is a list of turns and nothing else as `messages`."""
    turns = row if isinstance(row, list) else []
    if turns and all(isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in turns):
        return {"messages": row}
    if not isinstance(row, Mapping):
        got = "null" if row is None else type(row).__name__
        raise BadData("is not an object", where=place, got=got, expected="an object with named fields")
    return row


def parse_labelled(row: RawRow, origin: Origin) -> Sequence[Record]:
    """Parse a conversation or a prompt with one reply, and `label` or `kto_tag`: whether the reply is good."""
    place = origin.place
    label = _truth(row["kto_tag"] if "kto_tag" in row else row.get("label"), place)
    plain = {k: v for k, v in row.items() if k not in ("label", "kto_tag")}
    form = detect(plain, place)
    if form not in ("conversations", "prompt_reply", "alpaca"):
        raise BadData(f"labels a row of the format {form}", where=place, expected="a chat, or a prompt and a reply")
    (chat,) = FORMATS[form](plain, origin)
    if not isinstance(chat, ChatExample) or len(chat.messages) < 2 or chat.messages[-1].role != "assistant":
        raise BadData("does not end with the reply that is labelled", where=place, expected="an assistant's turn last")
    *prompt, reply = chat.messages
    if reply.calls:
        raise BadData("labels a reply that calls a tool", where=place, expected="a reply of text")
    return [
        LabelledReply(**origin._asdict(), prompt=tuple(prompt), reply=written_out(reply), label=label, tools=chat.tools)
    ]


def _truth(label: Any, place: str) -> bool:
    """Parse a label as people write it: true or false, 1 or 0, also as text, for tables have nothing else."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(label, (bool, int, str)) and str(label).strip().lower() in known:
        return known[str(label).strip().lower()]
    raise BadData('"label" is not true or false', where=place, got=repr(label), expected="true for a good reply")


FORMATS: Mapping[str, Callable[[RawRow, Origin], Sequence[Record]]] = {
    "conversations": parse_conversations,
    "alpaca": parse_alpaca,
    "seed_tasks": parse_seed_tasks,
    "prompt_reply": parse_prompt_reply,
    "choices": parse_choices,
    "preference": parse_preference,
    "ranked": parse_ranked,
    "labelled": parse_labelled,
    "prompt_text": parse_prompt_text,
    "text": parse_text,
    "pair": parse_pair,
}


def _has_label(row: RawRow) -> bool:
    """Return whether a reply is labelled good or bad; other tables' `label`, such as a class, has no reply."""
    if "kto_tag" in row or isinstance(row.get("label"), bool):
        return True
    replies = ("completion", "reply", "response")
    return "label" in row and "prompt" in row and any(key in row for key in replies)


def _has_prompt(row: RawRow) -> bool:
    return any(key in row for key in ("prompt", "question", "query", "instruction"))


_SIGNS: Mapping[str, Callable[[RawRow], bool]] = {
    "preference": lambda row: "chosen" in row or "chosen_messages" in row,
    "labelled": _has_label,
    "ranked": lambda row: (
        _has_prompt(row)
        and any(isinstance(row.get(key), list) for key in ("responses", "answers", "outputs", "output"))
    ),
    "conversations": lambda row: any(key in row for key in ("messages", "conversations", "conversation")),
    "seed_tasks": lambda row: "instruction" in row and "instances" in row,
    "alpaca": lambda row: f"{language_of(row)}instruction" in row and f"{language_of(row)}output" in row,
    "choices": lambda row: (
        any(key in row for key in ("question", "query", "Question"))
        and ("choices" in row or "options" in row or ("A" in row and "B" in row) or ("a" in row and "b" in row))
    ),
    "prompt_reply": lambda row: any(pair[0] in row and pair[1] in row for pair in PROMPT_REPLY),
    "pair": lambda row: any(pair[0] in row and pair[1] in row for pair in INPUT_TARGET),
    "prompt_text": lambda row: isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str),
    "text": lambda row: isinstance(row.get("text"), str) or set(row) == {"content"},
}
"""How each format is told, in the order of asking; other columns are not read."""


def _renamed(row: RawRow, columns: Mapping[str, str], place: str) -> tuple[RawRow, str]:
    """Rename the row's columns to our names; return it and the format that has those."""
    renamed = {}
    for field, column in columns.items():
        if column not in row:
            raise BadData(f'has no column "{column}"', where=place, got=f"the columns {', '.join(map(str, row))}"[:300])
        renamed[field] = row[column]
    return renamed, detect(renamed, place)
