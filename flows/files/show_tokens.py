"""Rows as tokens with their loss mask, for `temper render`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.files.inspect import any_file
from tasks.core.errors import BadData
from tasks.core.records import ChatExample, LabelledReply, PreferencePair, Record, SeqPair
from tasks.ingest.stage import Reading


class ShownRow(NamedTuple):
    """A rendered row: its place, and its tokens as text, each with whether it is a target.

    Tokens that only together are a character stand together.
    """

    place: str
    tokens: list[tuple[str, bool]]


def render(path: Path, tokenizer_folder: Path, show: int) -> tuple[list[ShownRow], dict[str, int], Counter[str]]:
    """Render a file's rows with a tokenizer, chats by its template.

    Returns:
        The first rows to show, counts (rows, rendered, tokens, target tokens), and why rows were refused.
    """
    from tasks.tokenization.chat_template import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    shown: list[ShownRow] = []
    counts, refused = {"rows": 0, "rendered": 0, "tokens": 0, "target_tokens": 0}, Counter[str]()
    for record in Reading("", any_file(path)).records():
        counts["rows"] += 1
        try:
            parts = render_record(record, tokenizer)
        except BadData as error:
            refused[error.what] += 1
            continue
        for name, ids, mask in parts:
            counts["rendered"] += 1
            counts["tokens"] += len(ids)
            counts["target_tokens"] += sum(mask)
            if len(shown) < show:
                shown.append(ShownRow(f"{record.file}:{record.row}{name}", _as_text(tokenizer, ids, mask)))
    return shown, counts, refused


def render_record(record: Record, tokenizer: Any) -> list[tuple[str, list[int], list[bool]]]:
    """Render a row as token ids with its loss mask: of two replies both, and of an input and its target both."""
    from tasks.render.stage import tokens_of_pairs
    from tasks.tokenization.chat_template import Answered, Chat, render_chat, render_replies

    if isinstance(record, ChatExample):
        ids, mask, _ = render_chat(tokenizer, record.messages, record.tools)
        return [("", ids, mask)]
    if isinstance(record, (PreferencePair, LabelledReply)):
        pair = isinstance(record, PreferencePair)
        replies = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.reply,)
        (answered,) = render_replies(tokenizer, [Chat(record.prompt, record.tools)], [replies])
        if not isinstance(answered, Answered):
            raise answered
        names = (" chosen", " rejected") if pair else ("",)
        return [
            (name, answered.prompt + reply, [False] * len(answered.prompt) + [True] * len(reply))
            for name, reply in zip(names, answered.replies, strict=True)
        ]
    if isinstance(record, SeqPair):
        ((given, wanted),) = tokens_of_pairs(tokenizer, [record])
        return [(" input", given, [False] * len(given)), (" target", wanted, [True] * len(wanted))]
    raise BadData(f"rows of the kind {record.kind} are not rendered")


def _as_text(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    waiting: list[int] = []
    for place, token in enumerate(ids):
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        last = place + 1 == len(ids) or mask[place + 1] != mask[place]
        if last or not text.endswith("\ufffd") or len(waiting) == LONGEST_CHARACTER:
            pieces.append((text, mask[place]))
            waiting = []
    return pieces


LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most, of one character in UTF-8."""
