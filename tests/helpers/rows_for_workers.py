"""Functions that tests run in a worker of `tasks/core/limited_process.py`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def doing(what: str) -> Callable[[Any], Any]:
    """Return one of this module's functions of a row; `open` never returns."""
    if what == "open":
        hang()
    return str if what == "echo" else lambda row: _DOINGS[row[0]](row[1])


def hang(_: Any = None) -> str:
    """Spend time in one call into C, which no alarm interrupts."""
    return str(re.match(r"(a+)+$", "a" * 60 + "b"))


def _raise(text: str) -> str:
    raise ValueError(text)


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def _end(number: int) -> str:
    os.kill(os.getpid(), number)
    time.sleep(60)
    return ""


_DOINGS: dict[str, Callable[[Any], Any]] = {
    "text": str,
    "hang": hang,
    "fill": lambda size: str(len("a" * size)),
    "long": lambda size: "a" * size,
    "raise": _raise,
    "die": _end,
    "sleep": _sleep,
    "marks": lambda text: (text, [1, [2]]),
    "pid": lambda _: str(os.getpid()),
    "variables": lambda _: " ".join(os.environ),
    "print": lambda text: str(print(text)),
    "write": lambda path: str(Path(path).write_text("x")),
}
