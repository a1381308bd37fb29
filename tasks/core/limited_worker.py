"""The process that `tasks/core/limited_process.py` starts: it runs functions on rows, within its limits.

It imports nothing but the standard library and what it is asked to run. The kernel ends it: by SIGPROF when a row has
taken too much processor time, and by SIGIO when the process that started it is gone, in the middle of a call as well.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import mmap
import os
import pickle
import resource
import signal
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from tasks.core.limited_process import HEAD, MEMORY, PLACE, REFUSED, SIZE

_SENT_CHARACTERS = 1 << 20
"""Results are sent once they are so long together."""

_OPENED_AT_ONCE = 8
"""Templates and the like that are kept ready."""

_ERROR_CHARACTERS = 2000

_OWN_CHARACTERS = 1 << 20
_TIMES_ITS_ROW = 64
"""Text that is made of a row may have so many characters, and so many for each byte of the row."""


def main() -> NoReturn:
    """Serve requests from one pipe, answering on another, until the first is closed."""
    given = json.loads(sys.argv[2])
    _end_with(given["alive"])
    shared = mmap.mmap(given["shared"], PLACE.size)
    answers = given["answers"]
    try:
        for module in given["modules"]:
            importlib.import_module(module)
        _limit(given["memory_bytes"])
    except Exception:
        _write(answers, traceback.format_exc().encode())
        os._exit(1)
    gc.freeze()
    _write(answers, HEAD.pack(0, 0))
    work = _Work(shared, answers, given["row_s"])
    with open(given["requests"], "rb", closefd=False) as requests:
        while lengths := requests.read(HEAD.size):
            head, body = (requests.read(size) for size in HEAD.unpack(lengths))
            work.answer(head, body)
    os._exit(0)


def _end_with(alive: int) -> None:
    """Let the kernel end this process, as SIGIO does, when nobody holds the other end of a pipe any more."""
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETFL, fcntl.fcntl(alive, fcntl.F_GETFL) | os.O_ASYNC)


def _limit(memory_bytes: int) -> None:
    """Limit this process from now on: in memory beyond what it has, and to writing to its pipes."""
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(what, (0, 0))
    with suppress(FileNotFoundError), open("/proc/self/statm") as file:  # where there is none, no such limit holds
        most = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


class _Work:
    """What is asked, and the functions that were made ready for it."""

    def __init__(self, shared: mmap.mmap, answers: int, row_s: float) -> None:
        self._shared, self._answers, self._row_s = shared, answers, row_s
        self._opened: OrderedDict[bytes, Callable[[Any], Any]] = OrderedDict()

    def answer(self, head: bytes, body: bytes) -> None:
        """Run a function on rows and send what comes of each."""
        rows: list[Any] = pickle.loads(body)  # noqa: S301  # from the process that started this one
        most = _OWN_CHARACTERS + _TIMES_ITS_ROW * len(body) // max(len(rows), 1)
        said, texts, size = list[Any](), list[str](), 0
        wrong = self._open(head)
        for place, row in enumerate(rows):
            self._shared[:] = PLACE.pack(place)
            text, beside = (None, wrong) if wrong else self._run(head, row, most)
            wait = True
            if text is None:
                said.append(beside)
                wait = beside[0] == REFUSED  # whoever counts what was lost may have enough
            else:
                said.append([len(text), beside] if beside is not None else len(text))
                texts.append(text)
                size += len(text)
            if size > _SENT_CHARACTERS or not wait:
                self._send(said, texts)
                said, texts, size = [], [], 0
        signal.setitimer(signal.ITIMER_PROF, 0)
        if said:
            self._send(said, texts)

    def _open(self, head: bytes) -> tuple[str, str, str] | None:
        """Make a function ready, and return what is wrong with it, if anything is."""
        if head in self._opened:
            self._opened.move_to_end(head)
            return None
        signal.setitimer(signal.ITIMER_PROF, self._row_s)
        try:
            function, common = pickle.loads(head)  # noqa: S301  # from the process that started this one
            module, _, name = function.partition(":")
            self._opened[head] = getattr(importlib.import_module(module), name)(common)
        except Exception as error:
            return _failure(error)
        if len(self._opened) > _OPENED_AT_ONCE:
            self._opened.popitem(last=False)
        return None

    def _run(self, head: bytes, row: Any, most: int) -> tuple[str | None, Any]:
        signal.setitimer(signal.ITIMER_PROF, self._row_s)
        try:
            made = self._opened[head](row)
        except Exception as error:
            return None, _failure(error)
        text, beside = (made, None) if isinstance(made, str) else made
        if len(text) > most:
            return None, (SIZE, f"{len(text):,} characters", "")
        return text, beside

    def _send(self, said: list[Any], texts: list[str]) -> None:
        head = json.dumps(said).encode()
        body = "".join(texts).encode(errors="surrogatepass")
        _write(self._answers, HEAD.pack(len(head), len(body)) + head + body)


def _failure(error: Exception) -> tuple[str, str, str]:
    if isinstance(error, MemoryError):
        return MEMORY, "", ""  # the process that started this one knows how much it gave
    return REFUSED, str(error)[:_ERROR_CHARACTERS], type(error).__name__


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
