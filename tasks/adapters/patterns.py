"""Regular expressions of an adapter's configuration, tried on a model's names before PEFT and the merge match them.

A pattern such as `(a+)+$` takes longer than the universe on a name that it does not match, and no alarm interrupts it.
So every pattern is matched to every name once, by the worker with its limits, in all the forms in which PEFT matches:
names are short, and the same match takes the same time again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from tasks.core.errors import BadModel
from tasks.core.limited_process import FAILURES, WORKER, Failure

_FORMS = (
    "{}",
    r"(.*\.)?({})$",
    r".*\.{}$",
    r"(^|.*\.){}($|\..*)",
    r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
)
"""How PEFT 0.21 puts a pattern together with what may stand around it."""

_REPEATS = re.compile(r"[*+?{]")
"""Without any of these a pattern takes no longer than a name is long."""


def check_patterns(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse patterns that cannot be matched to a model's names in time.

    Args:
        config: an adapter's, of params or of a file; whatever text in it may be a pattern is taken for one.
        names: of the modules and weights that it is matched to.
        where: the place of the configuration, for the error.

    Raises:
        BadModel: there is one.
    """
    patterns = sorted({text for text in _texts(config) if _REPEATS.search(text)})
    if not patterns:
        return
    try:
        found = WORKER.map("tasks.adapters.patterns:matcher", sorted(set(names)), patterns)
    except BadModel as error:
        error.where, error.fix = f"{where}: its patterns", "name the modules, as a list"
        raise
    wrong = [
        f"{pattern[:200]!r}: {FAILURES[each.kind]} ({each.text})"
        for pattern, each in zip(patterns, found, strict=True)
        if isinstance(each, Failure)
    ]
    if wrong:
        raise BadModel(
            "has patterns that cannot be matched to the names of this model's modules",
            where=where,
            examples=wrong,
            expected="patterns without repeats in repeats, such as `(a+)+`",
            fix="name the modules, as a list",
        )


def matcher(names: list[str]) -> Callable[[str], str]:
    """Return what matches a pattern to names in all forms, for its time alone."""

    def match(pattern: str) -> str:
        for form in _FORMS:
            with suppress(re.error, OverflowError):  # what is no pattern is refused by whoever reads it
                whole = re.compile(form.replace("{}", pattern))
                for name in names:
                    whole.match(name)
                    whole.fullmatch(name)
                    whole.search(name)
        return ""

    return match


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for inner in value:
            yield from _texts(inner)
