"""What is to be said of rows that were read: how something in them was taken, and what in them is not read.

A parser says it where it finds it, as a warning is given; who reads a source collects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_heard: ContextVar[Counter[str] | None] = ContextVar("heard", default=None)


class NotRead(str):
    """A remark on something in a row that no field of ours holds; other remarks say how something was taken."""

    __slots__ = ()


def remark(text: str) -> None:
    """Say something of the row that is being read, its kind being its class; nobody need listen."""
    if (heard := _heard.get()) is not None:
        heard[text] += 1


@contextmanager
def collected(remarks: Counter[str]) -> Iterator[None]:
    """Count what is said within this block."""
    token = _heard.set(remarks)
    try:
        yield
    finally:
        _heard.reset(token)
