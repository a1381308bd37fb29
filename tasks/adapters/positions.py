"""Layers, and tokens of a prompt, that are changed, as params and adapters name them.

Without torch, so that params can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

LAYERS = r"all|\d+-\d+"
"""How layers are chosen by a word, as a regular expression."""


class Spans(NamedTuple):
    """Spans of tokens of each prompt: a number at its beginning, a number at its end, or all."""

    first: int
    last: int
    all: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the spans, each with a separate edit unless edits are shared."""
        return ("all",) if self.all else tuple(name for name in ("first", "last") if getattr(self, name))


def parse_positions(text: str) -> Spans:
    """Parse `last`, `all`, `fN`, `lN` or `fN+lM`.

    Raises:
        ValueError: it is none of these.
    """
    if text in ("last", "all"):
        return Spans(0, 1) if text == "last" else Spans(0, 0, all=True)
    found = re.fullmatch(r"f([1-9]\d*)(?:\+l([1-9]\d*))?|l([1-9]\d*)", text)
    if not found:
        raise ValueError(f"positions: got {text!r}, expected last, all, fN, lN or fN+lM")
    return Spans(int(found[1] or 0), int(found[2] or found[3] or 0))


def parse_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Return the numbers of the layers that `all`, `FIRST-LAST` or a list of numbers chooses, of `count` layers.

    Raises:
        ValueError: there is no such layer.
    """
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str):
        first, last = map(int, layers.split("-"))
        layers = range(first, last + 1)
    if not layers or (outside := [number for number in layers if not 0 <= number < count]):
        got = list(outside) if layers else "none"
        raise ValueError(f"layers: got {got}, expected 0 to {count - 1}")
    return list(layers)
