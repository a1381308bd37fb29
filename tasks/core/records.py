"""The kinds of rows. Every input format becomes one of these at ingest; nothing downstream sees anything else."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

from tasks.core.errors import BadData


class Message(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: system, user, assistant or tool.
        content: the text.
        calls: the tools that the assistant calls in this turn, as a JSON list of {name, arguments}; empty for none.
            Arguments that were given as text have that too, as `text`.
        learn: whether the loss falls on it, if it is the assistant's.
        reasoning: what the assistant thinks before its text.
        name: the tool whose result this is, or the speaker.
        call_id: the id of the call whose result this is; of a turn that calls, the ids of its calls, one a line.
    """

    role: str
    content: str
    calls: str = ""
    learn: bool = True
    reasoning: str = ""
    name: str = ""
    call_id: str = ""


def written_out(message: Message) -> str:
    """Return a turn's text with its reasoning before it, in the tags that Qwen3 and DeepSeek-R1 have in theirs."""
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}" if message.reasoning else message.content


def calls_with_ids(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls of a turn, each with its id, which is empty where it has none."""
    calls = json.loads(message.calls or "[]")
    ids = message.call_id.split("\n") if message.call_id else [""] * len(calls)
    return list(zip(ids, calls, strict=True))


def tool_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """Build a call as messages have it, with its id if it has one."""
    function = {"name": name, "arguments": arguments}
    return {**({"id": call_id} if call_id else {}), "type": "function", "function": function}


def conversation(asked: Any) -> list[Message]:
    """Check the messages of a request: a list of mappings with role and content.

    Raises:
        BadData: it is none, or is empty.
    """
    try:
        turns = [Message(turn["role"], turn["content"]) for turn in asked]
    except (KeyError, TypeError):
        turns = []
    if not turns or not all(isinstance(text, str) for turn in turns for text in turn[:2]):
        got = repr(asked)
        raise BadData(
            "is no conversation",
            got=got if len(got) < 100 else f"{got[:99]}…",
            expected="a list of turns, each with a role and a content",
        )
    return turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Row with the fields that every kind has.

    Attributes:
        id: unique within the workspace.
        source: the key of `ingest.sources` that it came from.
        file: the file that it came from; empty for generated rows.
        row: its line or number in that file, from 1; 0 for generated rows.
        family: the kind of question, by which results are reported; empty when unknown.
        group: rows of one group never cross the split; empty means the normalised prompt.
    """

    kind: ClassVar[str]

    id: str
    source: str
    file: str = ""
    row: int = 0
    family: str = ""
    group: str = ""

    def prompt_text(self) -> str:
        """Return the prompt for the model, as one string."""
        raise NotImplementedError

    def split_group(self) -> str:
        """Return the name of the group that stays on one side of the split."""
        return self.group or normalized_text(self.prompt_text())


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExample(Record):
    """A chat; the assistant's turns are what is trained on. `tools` are JSON schemas, as text."""

    kind: ClassVar[str] = "chat"

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()

    def prompt_text(self) -> str:
        """Return the first user turn."""
        return next((m.content for m in self.messages if m.role == "user"), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair(Record):
    """Two replies to one prompt."""

    kind: ClassVar[str] = "preference"

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    tools: tuple[str, ...] = ()

    def prompt_text(self) -> str:
        """Return the first user turn."""
        return next((m.content for m in self.prompt if m.role == "user"), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledReply(Record):
    """A reply that is good (`label` true) or bad, without another to compare it with (arXiv:2402.01306)."""

    kind: ClassVar[str] = "labelled"

    prompt: tuple[Message, ...]
    reply: str
    label: bool
    tools: tuple[str, ...] = ()

    def prompt_text(self) -> str:
        """Return the first user turn."""
        return next((m.content for m in self.prompt if m.role == "user"), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExample(Record):
    """Plain text, for pretraining."""

    kind: ClassVar[str] = "text"

    text: str

    def prompt_text(self) -> str:
        """Return the text itself."""
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqPair(Record):
    """An input and its target, for encoder-decoder models."""

    kind: ClassVar[str] = "pair"

    input: str
    target: str

    def prompt_text(self) -> str:
        """Return the input."""
        return self.input


KINDS: dict[str, type[Record]] = {
    kind.kind: kind for kind in (ChatExample, PreferencePair, LabelledReply, TextExample, SeqPair)
}
"""Every kind of row, by its name: the name of its file, too."""


@cache
def _of_one_width() -> dict[int, int]:
    """Map the characters that Unicode has again in full or half width to their usual ones, and its wide space."""
    forms = {code: unicodedata.decomposition(chr(code)).split() for code in (0x3000, *range(0xFF01, 0xFFEF))}
    return {code: int(form[1], 16) for code, form in forms.items() if form and form[0] in ("<wide>", "<narrow>")}


def normalized_text(text: str) -> str:
    """Normalise a text's case, width, composition and white space: texts that are the same become equal strings.

    This one form decides what is equal: for duplicates, contradictions, the groups of the split, and questions that
    stand whole in other rows. All other characters mean something and stay: 8 - 2 is not 8 + 2, and 2 squared is not
    22, which is why it is NFC and a change of widths instead of NFKC.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_of_one_width()))
    return " ".join(text.casefold().split())


def held_out(group: str, fraction: float) -> bool:
    """Return whether a group is held out: a fixed function of its name, so that growing data never moves it."""
    position = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return position < fraction
