"""Work that came with somebody's model, done in a process of its own with little time and little memory.

An alarm cannot interrupt one call into C, such as `'a' * 10**10` or a regular expression, and what such a call takes is
this process's memory. So what a model brings along (templates, patterns, a tokenizer's normalizer) is run by a worker:
a fresh interpreter without torch, started once and kept warm, whose memory the kernel limits and which is killed when a
row takes too long. The row gets the reason, the next row another worker.

The worker runs nothing but functions of this project, named by the caller; it leads a session of its own, so that
signals to the caller's group do not reach it, and the kernel ends it when the caller is gone, whatever it is doing.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import BadModel, TemperError


class Limits(NamedTuple):
    """How much a row may take.

    Attributes:
        row_s: processor time, which a busy machine does not change; and `_CLOCK_TIMES` as much by the clock.
        lost_s: time that may be lost on rows which took too long, within the last `LOST_WITHIN_S`.
        memory_bytes: beyond what the worker has when it is ready.
    """

    row_s: float = 2.0
    lost_s: float = 30.0
    memory_bytes: int = 512 << 20


LIMITS = Limits()
LOST_WITHIN_S = 60.0
"""A server may lose `lost_s` in every so many seconds; a file whose rows lose most of its time ends."""

START_S = 60.0
"""How long a worker may take until it is ready."""

REFUSED, TIME, MEMORY, SIZE, DIED = "refused", "time", "memory", "size", "died"

FAILURES = {
    REFUSED: "cannot be used",
    TIME: "does not come to an end",
    MEMORY: "takes too much memory",
    SIZE: "makes too long a text",
    DIED: "breaks the process that runs it",
}
"""What is to be said of each kind of failure."""

OPENING = -1
"""Stands for a row while what all rows have in common is made ready."""

HEAD = struct.Struct("<QQ")
"""The lengths in bytes of a message's two parts."""

PLACE = struct.Struct("<q")
"""The row that is worked on, in memory that both processes see."""

_OTHER_FAILURE_S = 0.25
"""About how long it takes until memory is full, or until there is another worker."""

_CLOCK_TIMES = 10
"""What a row may take by the clock, on a busy machine, for what it may take of the processor."""

_BLOCK = 1 << 20
_BATCH_BYTES = 8 << 20
"""Rows that are sent at once, so that they take little of the worker's memory."""

_ENVIRONMENT = {"PATH": os.defpath, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
_KEPT = ("LD_LIBRARY_PATH",)
"""Variables of this process without which an interpreter may not start; secrets are in others."""

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tasks.core.limited_worker import main; main()"


class Failure(NamedTuple):
    """Why a row has no result.

    Attributes:
        kind: REFUSED by an exception of the work itself, TIME, MEMORY, SIZE of the result, or DIED.
        text: the exception's, or the limit.
        error: the class of the exception.
    """

    kind: str
    text: str
    error: str = ""


class Result(NamedTuple):
    """Text that was made of a row, and what was said beside it, as JSON has it."""

    text: str
    beside: Any = None


class _Ended(Exception):
    """The worker has ended, or was ended, while it worked on a row."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


_ALL: list[LimitedProcess] = []


class LimitedProcess:
    """A worker, made when it is first needed and again whenever one had to be ended."""

    def __init__(self, limits: Limits = LIMITS, modules: Sequence[str] = ()) -> None:
        """Set the limits, and the modules that a worker imports before it is ready."""
        self.limits = limits
        self._modules = modules
        self._lock = threading.RLock()
        self._worker: _Worker | None = None
        self._lost: deque[tuple[float, float]] = deque()
        _ALL.append(self)

    def start(self) -> None:
        """Start a worker, unless there is one, without waiting until it is ready."""
        with self._lock:
            self._started()

    def _started(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self.limits, self._modules)
        return self._worker

    def close(self) -> None:
        """End the worker; the next call makes another."""
        with self._lock:
            if self._worker:
                self._worker.end()
                self._worker = None

    def map(self, function: str, common: Any, rows: Sequence[Any]) -> list[Result | Failure]:
        """Run a function on rows, in their order.

        Args:
            function: `module:name` of a function that takes `common` and returns one that takes a row and returns text,
                or text and something that JSON has.
            common: what all rows have in common; pickled.
            rows: pickled.

        Raises:
            BadModel: too much time was lost on rows that took too long.
        """
        results: list[Result | Failure | None] = [None] * len(rows)
        head = pickle.dumps((function, common), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            for places, body in _batches(rows):
                self._run(head, places, body, rows, results)
        return [Failure(DIED, "no answer") if result is None else result for result in results]

    def _run(
        self,
        head: bytes,
        places: Sequence[int],
        body: bytes,
        rows: Sequence[Any],
        results: list[Result | Failure | None],
    ) -> None:
        """Run rows on the worker, and on another what is left of them whenever it has ended."""
        while places:
            self._check_lost()
            worker, done = self._started(), 0
            try:
                for found in worker.run(head, body, len(places)):
                    for result in found:
                        results[places[done]] = result
                        done += 1
                        self._lose(result)
                return
            except _Ended as end:
                at = worker.place() if worker.place() < 0 else max(worker.place(), done)
                self.close()
                self._lose(end.failure)
                if not 0 <= at < len(places):  # at what all rows have in common
                    for place in places[done:]:
                        results[place] = end.failure
                    return
                results[places[at]] = end.failure
                places = [*places[done:at], *places[at + 1 :]]
                body = pickle.dumps([rows[place] for place in places], pickle.HIGHEST_PROTOCOL)
            except BaseException:  # its answer would be taken for that to the next question
                self.close()
                raise

    def _lose(self, result: Result | Failure) -> None:
        """Count what a row took in vain, about."""
        if isinstance(result, Failure) and result.kind != REFUSED:
            self._lost.append((time.monotonic(), self.limits.row_s if result.kind == TIME else _OTHER_FAILURE_S))
            self._check_lost()

    def _check_lost(self) -> None:
        while self._lost and self._lost[0][0] < time.monotonic() - LOST_WITHIN_S:
            self._lost.popleft()
        if (lost := sum(each for _, each in self._lost)) >= self.limits.lost_s:
            raise BadModel(
                "takes more time or memory than it may, again and again",
                got=f"{len(self._lost)} times, about {lost:.0f} s in all",
                expected=f"{self.limits.row_s:g} s and {self.limits.memory_bytes >> 20} MiB at most for a row, and "
                f"{self.limits.lost_s:g} s lost in this way",
                fix="take another template, pattern or tokenizer",  # whoever knows which one says so
            )

    def forget(self) -> None:
        """Leave the worker to the process that this one was forked from."""
        self._lock = threading.RLock()
        if self._worker:
            self._worker.let_go()
            self._worker = None


WORKER = LimitedProcess(modules=("jinja2.ext", "jinja2.sandbox"))
"""The one that everything which came with a model goes through."""


def _end_all() -> None:
    for each in _ALL:
        each.close()


def _forget_all() -> None:
    for each in _ALL:
        each.forget()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)


def _batches(rows: Sequence[Any]) -> Iterator[tuple[Sequence[int], bytes]]:
    """Yield the places of rows with their bytes, as many at once as are small enough together."""
    body = pickle.dumps(list(rows), pickle.HIGHEST_PROTOCOL)
    if len(body) <= _BATCH_BYTES or len(rows) == 1:
        yield range(len(rows)), body
        return
    some, size = list[int](), 0
    for place, row in enumerate(rows):
        own = len(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
        if some and size + own > _BATCH_BYTES:
            yield some, pickle.dumps([rows[n] for n in some], pickle.HIGHEST_PROTOCOL)
            some, size = [], 0
        some, size = [*some, place], size + own
    yield some, pickle.dumps([rows[n] for n in some], pickle.HIGHEST_PROTOCOL)


class _Worker:
    """One process, as the process that started it sees it."""

    def __init__(self, limits: Limits, modules: Sequence[str]) -> None:
        self._limits = limits
        self._ready = False
        with tempfile.TemporaryFile() as file:
            file.truncate(PLACE.size)
            self._shared = mmap.mmap(file.fileno(), PLACE.size)
            asked, self._requests = os.pipe()
            alive, self._alive = os.pipe()
            self._answers, answers = os.pipe()
            given = {
                "requests": asked,
                "answers": answers,
                "alive": alive,
                "shared": file.fileno(),
                "memory_bytes": limits.memory_bytes,
                "row_s": limits.row_s,
                "modules": list(modules),
            }
            root = str(Path(__file__).resolve().parents[2])
            path = [root, *(each or os.getcwd() for each in sys.path)]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _BOOT, json.dumps(path), json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT | {name: os.environ[name] for name in _KEPT if name in os.environ},
                pass_fds=[asked, answers, alive, file.fileno()],
                start_new_session=True,
            )
        for theirs in (asked, answers, alive):
            os.close(theirs)
        os.set_blocking(self._answers, False)
        os.set_blocking(self._requests, False)

    def place(self) -> int:
        """Return the row that the worker is or was at."""
        return int(PLACE.unpack(self._shared[:])[0])

    def run(self, head: bytes, body: bytes, count: int) -> Iterator[list[Result | Failure]]:
        """Run a function on rows and yield the results, some at once.

        Raises:
            _Ended: the worker has ended before it was done.
        """
        if not self._ready:
            if self._read(START_S, HEAD.size) != HEAD.pack(0, 0):
                raise TemperError("a worker does not start", got=self._rest())
            self._ready = True
        self._shared[:] = PLACE.pack(OPENING)
        self._write(HEAD.pack(len(head), len(body)) + head + body)
        while count > 0:
            lengths = self._receive(HEAD.size)
            said, text = HEAD.unpack(lengths)
            found = [
                Failure(MEMORY, f"more than {self._limits.memory_bytes >> 20} MiB")
                if isinstance(each, Failure) and each.kind == MEMORY
                else each
                for each in _results(self._receive(said), self._receive(text))
            ]
            count -= len(found)
            yield found

    def _receive(self, size: int) -> bytes:
        return self._read(_CLOCK_TIMES * self._limits.row_s, size)

    def _read(self, seconds: float, size: int) -> bytes:
        """Read from the worker, as long as it does not stay at a row by the clock: the kernel counts its own time."""
        parts, left = list[bytes](), size
        at, since = self.place(), time.monotonic()
        while left:
            if not select.select([self._answers], [], [], seconds / 8)[0]:
                if self.place() != at:
                    at, since = self.place(), time.monotonic()
                elif time.monotonic() - since > seconds:
                    raise _Ended(self._too_long())
                continue
            part = os.read(self._answers, min(left, _BLOCK))
            if not part:
                raise _Ended(self._death())
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not select.select([], [self._requests], [], START_S)[1]:
                raise _Ended(Failure(TIME, "does not take its work"))
            try:
                view = view[os.write(self._requests, view[:_BLOCK]) :]
            except BrokenPipeError:
                raise _Ended(self._death()) from None

    def _too_long(self) -> Failure:
        return Failure(TIME, f"more than {self._limits.row_s:.1f} s")

    def _death(self) -> Failure:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return self._too_long()
        return Failure(DIED, f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})")

    def _rest(self) -> str:
        with suppress(_Ended, BlockingIOError):
            return os.read(self._answers, _BLOCK).decode(errors="replace")[-2000:]
        return ""

    def end(self) -> None:
        """Kill the worker and wait for its end."""
        self._process.kill()
        self._process.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends."""
        for descriptor in (self._requests, self._answers, self._alive):
            os.close(descriptor)
        self._shared.close()
        self._process.returncode = 0 if self._process.returncode is None else self._process.returncode


def _results(said: bytes, text: bytes) -> list[Result | Failure]:
    """Read a message: for each row the characters of its text, those and what is beside, or why there is none."""
    whole, start = text.decode(errors="surrogatepass"), 0
    results: list[Result | Failure] = []
    for each in json.loads(said):  # no pickle: whoever leaves the sandbox is not to come further than the worker
        if isinstance(each, int):
            results.append(Result(whole[start : start + each]))
            start += each
        elif isinstance(each[0], int):
            results.append(Result(whole[start : start + each[0]], each[1]))
            start += each[0]
        else:
            results.append(Failure(*map(str, each)))
    return results
