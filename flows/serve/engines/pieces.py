"""The bytes that each token of a model stands for, and tokens for given bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property


class Pieces:
    """Bytes of tokens, read when they are first needed: for a large vocabulary it takes a moment.

    Args:
        read: gives the bytes of each token, by its number.
    """

    def __init__(self, read: Callable[[], Sequence[bytes]]) -> None:
        self._read = read

    @cached_property
    def _pieces(self) -> Sequence[bytes]:
        return self._read()

    @cached_property
    def _numbers(self) -> Mapping[bytes, int]:
        return {piece: number for number, piece in reversed(list(enumerate(self._pieces))) if piece}

    def join(self, tokens: Sequence[int]) -> bytes:
        """Return the bytes of some tokens together."""
        return b"".join(self._pieces[token] for token in tokens)

    def spell(self, text: bytes, count: int) -> list[int] | None:
        """Return so many tokens that stand for these bytes; None where there are none."""
        return next(self._spellings(text, count), None)

    def _spellings(self, text: bytes, count: int) -> Iterator[list[int]]:
        if count == 0:
            if not text:
                yield []
            return
        for end in range(1, len(text) - count + 2):
            if (number := self._numbers.get(text[:end])) is not None:
                yield from ([number, *rest] for rest in self._spellings(text[end:], count - 1))
