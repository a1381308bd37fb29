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
from tasks.render.params import Render


class ShownRow(NamedTuple):
    """A rendered row: its place, and its tokens as text, each with whether it is a target.

    Tokens that only together are a character stand together.
    """

    place: str
    tokens: list[tuple[str, bool]]


class Refusal(NamedTuple):
    """Why rows were refused: the first of those with one reason, and how many there are."""

    first: BadData
    rows: int


class Rendering(NamedTuple):
    """What became of a file's rows.

    Attributes:
        shown: the first rows.
        counts: `rows`, `rendered`, `tokens` and `target_tokens`.
        refused: by what was wrong.
        remarks: what is to be said of rows that were taken.
    """

    shown: list[ShownRow]
    counts: dict[str, int]
    refused: dict[str, Refusal]
    remarks: Counter[str]

    def refuse(self, error: BadData) -> None:
        """Count a row that was refused."""
        before = self.refused.get(error.what, Refusal(error, 0))
        self.refused[error.what] = before._replace(rows=before.rows + 1)


def render(path: Path, tokenizer_folder: Path, show: int, params: Render, max_tokens: int | None) -> Rendering:
    """Render a file's rows with a tokenizer, chats by its template.

    Args:
        path: the file.
        tokenizer_folder: a folder with the tokenizer.
        show: how many rows to show.
        params: which turns are trained on, and what becomes of reasoning.
        max_tokens: longer rows are refused; None for any length.

    Raises:
        BadData: no row can be rendered.
    """
    from tasks.tokenization.chat_template import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    reading = Reading("", any_file(path))
    found = Rendering([], {"rows": 0, "rendered": 0, "tokens": 0, "target_tokens": 0}, {}, reading.remarks)
    for record in reading.records():
        found.counts["rows"] += 1
        place = f"{record.file}:{record.row}"
        try:
            parts = render_record(record, tokenizer, params)
            longest = max(len(ids) for _, ids, _ in parts)
            if max_tokens and longest > max_tokens:
                raise BadData("is longer than --max-tokens", got=f"{longest} tokens", fix=f"--max-tokens {longest}")
        except BadData as error:
            error.where = error.where or place
            found.refuse(error)
            continue
        for name, ids, mask in parts:
            found.counts["rendered"] += 1
            found.counts["tokens"] += len(ids)
            found.counts["target_tokens"] += sum(mask)
            if len(found.shown) < show:
                found.shown.append(ShownRow(f"{place}{name}", _as_text(tokenizer, ids, mask)))
    for malformed in reading.refused:  # which never came to the template
        found.refuse(malformed)
    if not found.counts["rendered"]:
        first = next(iter(found.refused.values())).first
        lines = [f"{each.rows} x {each.first.line()}" for each in found.refused.values()]
        raise BadData("no row can be rendered", where=str(path), examples=lines, fix=first.fix)
    return found


def render_record(record: Record, tokenizer: Any, params: Render) -> list[tuple[str, list[int], list[bool]]]:
    """Render a row as token ids with its loss mask: of two replies both, and of an input and its target both."""
    from tasks.render.stage import prompt_of, tokens_of_pairs
    from tasks.tokenization.chat_template import Answered, render_chat, render_replies
    from tasks.tokenization.template_form import reasoning_kept

    if isinstance(record, ChatExample):
        messages = reasoning_kept(record.messages, params.reasoning)
        ids, mask, _ = render_chat(tokenizer, messages, record.tools, params.loss_on)
        return [("", ids, mask)]
    if isinstance(record, (PreferencePair, LabelledReply)):
        pair = isinstance(record, PreferencePair)
        replies = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record.reply,)
        (answered,) = render_replies(tokenizer, [prompt_of(record, params)], [replies])
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
