"""Repairs of texts: what each changes is stated, done only where its check found something, and recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple
from unicodedata import normalize

from tasks.core.records import Message, Record
from tasks.text.patterns import PATTERNS

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Repair(NamedTuple):
    """One text of a row before and after."""

    id: str
    check: str
    before: str
    after: str


def remove_control_characters(text: str) -> str:
    """Remove control characters, which a terminal obeys and nobody reads; tabs and line ends stay."""
    return _CONTROL.sub("", text)


def compose(text: str) -> str:
    """Compose a text into Unicode's NFC: the same letters, in the form that tokenizers are trained on."""
    return normalize("NFC", text)


def strip(text: str) -> str:
    """Strip white space at both ends."""
    return text.strip()


def decode_again(text: str) -> str:
    """Undo a wrong decoding where that is certain, by ftfy."""
    import ftfy

    return ftfy.fix_encoding(text)


def _mask(check: str, word: str) -> Callable[[str], str]:
    patterns = [re.compile(pattern.regex) for pattern in PATTERNS[check]]

    def mask(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub(word, text)
        return text

    return mask


REPAIRS: Mapping[str, Callable[[str], str]] = {
    "control_characters": remove_control_characters,
    "unicode_normalization": compose,
    "outer_space": strip,
    "mojibake": decode_again,
    "emails": _mask("emails", "[email]"),
    "phone_numbers": _mask("phone_numbers", "[phone_number]"),
    "secrets": _mask("secrets", "[secret]"),
}
"""What `action: repair` does, by check; the others cannot be repaired."""


def repair(record: Record, checks: Sequence[str]) -> tuple[Record, list[Repair]]:
    """Repair every text of a row.

    Args:
        record: the row.
        checks: keys of `REPAIRS`, in the order of repairing.

    Returns:
        The row as it is now, and one entry for each text that a check changed.
    """
    done: list[Repair] = []
    for check in checks:
        changed: dict[str, Any] = {}
        for name, value in _texts_of(record).items():
            new = _changed(value, REPAIRS[check])
            if new != value:
                changed[name] = new
                done += [Repair(record.id, check, b, a) for b, a in _pairs(value, new) if a != b]
        record = replace(record, **changed)
    return record, done


_SAID = ("content", "calls", "reasoning")
"""The texts of a turn."""


def _texts_of(record: Record) -> dict[str, str | tuple[Message, ...]]:
    names = ("messages", "prompt", "chosen", "rejected", "reply", "text", "input", "target")
    return {field.name: getattr(record, field.name) for field in fields(record) if field.name in names}


def _changed(value: str | tuple[Message, ...], how: Callable[[str], str]) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return how(value)
    return tuple(m._replace(content=how(m.content), calls=how(m.calls), reasoning=how(m.reasoning)) for m in value)


def _pairs(before: Any, after: Any) -> list[tuple[str, str]]:
    if isinstance(before, str):
        return [(before, after)]
    return [
        (said, now)
        for one, other in zip(before, after, strict=True)
        for said, now in ((getattr(one, name), getattr(other, name)) for name in _SAID)
    ]
