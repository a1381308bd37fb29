"""Tokens to text, one by one: whole characters only, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""


class Detokenizer:
    """Decodes tokens as they come; what it has given is a beginning of what all tokens together decode to.

    A token's text may depend on the tokens before it, as the space before a word does, so a few of these are decoded
    with it. A character whose bytes are not all there yet is held back.

    Args:
        tokenizer: of the model.
        shown: control tokens that are written nevertheless, each with its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: Mapping[int, str] = MappingProxyType({})) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._ids: list[int] = []
        self._before = self._given = 0
        """Tokens from `_before` on are decoded; those before `_given` have been given."""

    def add(self, token: int) -> str:
        """Return the text that a token completes; empty where it completes no character."""
        if token in self._shown:
            rest = self.rest()
            self._before = self._given = len(self._ids)
            return rest + self._shown[token]
        self._ids.append(token)
        text = self._decoded(self._before, len(self._ids))
        known = self._decoded(self._before, self._given)
        if len(text) <= len(known) or text.endswith(_HALF):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text[len(known) :]

    def rest(self) -> str:
        """Return the text that was held back, as the tokens stand: half a character becomes a replacement one."""
        text = self._decoded(self._before, len(self._ids))
        known = self._decoded(self._before, self._given)
        self._given = len(self._ids)
        return text[len(known) :]

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)) if start < end else ""


class StopCutter:
    """Cuts a text that comes in pieces where the first of some texts is complete in it.

    The same whatever the pieces are: of several, the one that is complete first ends the text, and of those that end
    at the same place the longest. What may be the beginning of one is held back.

    Args:
        texts: what ends the text; none of them is empty.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = tuple(texts)
        self.pending = ""
        """What is held back."""
        self.stopped = False
        """Whether one of the texts has come; nothing is given after it."""

    def add(self, piece: str) -> str:
        """Return what is certain to stand before any of the texts."""
        if self.stopped:
            return ""
        text = self.pending + piece
        found = [(place + len(each), place) for each in self._texts if (place := text.find(each)) >= 0]
        if found:
            self.stopped, self.pending = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, each) for each in self._texts), default=0)
        self.pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Return what was held back, when nothing more comes."""
        text, self.pending = self.pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Strip:
    """Takes white space off both ends of a text that comes in pieces."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def add(self, piece: str) -> str:
        """Return what is certain to be no white space at an end."""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        self._begun = self._begun or bool(kept)
        return kept


class AnswerText:
    """Makes the text of one answer from its tokens, as it is given to the client.

    Args:
        tokenizer: of the model.
        stop: texts that end it, which are cut off.
        end_ids: the tokens that end it, which have no text.
        strip: whether white space at both ends is taken off, as in chats.
        shown: control tokens that are written nevertheless, each with its text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str] = (),
        end_ids: Collection[int] = (),
        strip: bool,
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._tokens = Detokenizer(tokenizer, shown)
        self._stop, self._strip, self._end_ids = StopCutter(stop), Strip() if strip else None, end_ids
        self.decoded = self.certain = 0
        """Characters that tokens were decoded to so far, and those of them that are certain to be in the answer."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stop.stopped

    def add(self, token: int) -> str:
        """Return the text that is certain after one token more."""
        if token in self._end_ids:
            return ""
        text = self._tokens.add(token)
        self.decoded += len(text)
        return self._given(self._stop.add(text))

    def rest(self) -> str:
        """Return what was held back, after the last token."""
        certain = self._stop.add(self._tokens.rest())
        return self._given(certain + self._stop.rest())

    def _given(self, text: str) -> str:
        self.certain += len(text)
        return self._strip.add(text) if self._strip else text
