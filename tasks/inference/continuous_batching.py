"""Requests of many callers written in one batch: each joins when it comes, and leaves at its end or when it is dropped.

One thread runs the model; callers are told each token as it is chosen. What a model cannot write in a batch that rows
join (soft prompts, windows of attention, encoder-decoders) is written one after another by `generate`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from itertools import count
from threading import Condition, Thread
from typing import NamedTuple, Protocol

from tasks.core.errors import Transient
from tasks.core.memory import free_bytes
from tasks.inference.decoding import Asked, DecodingBatch, Ended, Given, Written, can_decode, giving
from tasks.inference.streamed_generate import stream
from tasks.models.loader import Model

Tell = Callable[[Written | Ended], None]
"""What a caller is told, in the thread that runs the model: it must not wait."""

_BUSY_S = 1.0
"""After so long the queue may have room again."""


class Busy(Transient):
    """More requests wait than may.

    Attributes:
        retry_after_s: when to try again.
    """

    retry_after_s = _BUSY_S


class State(NamedTuple):
    """What an engine is doing.

    Attributes:
        running: requests that are being written.
        waiting: requests that wait for room.
        cache_bytes: memory of keys and values.
        most_cache_bytes: their limit.
        tokens: tokens written since the start.
    """

    running: int
    waiting: int
    cache_bytes: int
    most_cache_bytes: int
    tokens: int


class Engine(Protocol):
    """What writes continuations for callers of any thread: `ContinuousBatching`, or one that another process has."""

    def submit(self, asked: Asked, tell: Tell) -> Handle:
        """Ask for a continuation, whose tokens and then end are told as they come."""
        ...

    def drop(self, number: int) -> None:
        """Drop the request of a number."""
        ...

    def state(self) -> State:
        """Return what it is doing."""
        ...

    def close(self, *, finish: bool) -> None:
        """Take no more requests, and end."""
        ...


class Handle:
    """Request that can be dropped."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._number = engine, number

    def cancel(self) -> None:
        """Drop the request, which ends as "cancelled" before its next token; nothing where it has ended."""
        self._engine.drop(self._number)


class ContinuousBatching:
    """An engine that writes continuations for callers of any thread.

    Args:
        model: a model with or without an adapter; or what gives it with the adapters of some names for a block.
        end_ids: tokens that end a continuation.
        slots: so many are written at once, at most.
        cache_bytes: keys and values take so many bytes at most; None: a quarter of the memory that is free now.
        queue: so many may wait.
    """

    def __init__(
        self,
        model: Model | Given,
        end_ids: Collection[int],
        *,
        slots: int = 32,
        cache_bytes: int | None = None,
        queue: int = 256,
    ) -> None:
        self._with_adapters = giving(model)
        self._end_ids, self._slots, self._queue = frozenset(end_ids), slots, queue
        self._most_bytes = _free_bytes() // 4 if cache_bytes is None else cache_bytes
        self._numbers = count()
        self._changed = Condition()
        self._new: deque[tuple[int, Asked]] = deque()
        self._dropped: set[int] = set()
        self._tell: dict[int, Tell] = {}
        self._closing = self._at_once = False
        self._tokens = 0
        self._batch: DecodingBatch | None = None
        self._alone: deque[tuple[int, Asked]] = deque()
        self._thread = Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked, tell: Tell) -> Handle:
        """Ask for a continuation, whose tokens and then end are told as they come.

        Raises:
            Busy: too many wait, or the engine is being closed.
        """
        with self._changed:
            running = self._batch.going if self._batch else 0
            if self._closing or len(self._tell) - running >= self._queue:
                raise Busy(
                    "too many requests wait",
                    got=str(len(self._tell) - running),
                    expected=f"at most {self._queue}",
                    fix="try again",
                )
            number = next(self._numbers)
            self._tell[number] = tell
            self._new.append((number, asked))
            self._changed.notify()
        return Handle(self, number)

    def drop(self, number: int) -> None:
        """Drop the request of a number; its caller is told "cancelled"."""
        with self._changed:
            if number in self._tell:
                self._dropped.add(number)
                self._changed.notify()

    def state(self) -> State:
        """Return what the engine is doing."""
        with self._changed:
            going = self._batch.going if self._batch else 0
            held = self._batch.cache.bytes if self._batch else 0
            return State(going, len(self._tell) - going, held, self._most_bytes, self._tokens)

    def close(self, *, finish: bool) -> None:
        """Take no more requests, and end: after those it has if `finish`, else they end as "cancelled"."""
        with self._changed:
            self._closing, self._at_once = True, self._at_once or not finish
            self._changed.notify()
        self._thread.join()

    # --- the thread that runs the model -------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._receive():
            try:
                self._step()
            except Exception as error:  # each caller is told; the engine goes on with what comes next
                self._batch = None
                self._alone.clear()
                for number in list(self._tell):
                    if number not in {new for new, _ in self._new}:
                        self._told(number, Ended("error", error))
        for number in list(self._tell):
            self._told(number, Ended("cancelled"))

    def _receive(self) -> bool:
        """Wait for work, and take in what has come; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._tell or self._closing)
            if self._at_once or (self._closing and not self._tell):
                return False
            new, self._new = self._new, deque()
            dropped, self._dropped = self._dropped, set()
        for number, asked in new:
            if number not in dropped:
                self._take(number, asked)
        for number in dropped:
            if self._batch:
                self._batch.leave(number)
            self._alone = deque(each for each in self._alone if each[0] != number)
            self._told(number, Ended("cancelled"))
        return True

    def _take(self, number: int, asked: Asked) -> None:
        try:
            with self._with_adapters([asked.adapter]) as (model, _):
                joins = can_decode(model, asked.tokens)
            if not joins:
                self._alone.append((number, asked))
                return
            if self._batch is None:
                self._batch = DecodingBatch(
                    self._with_adapters, self._end_ids, rows=self._slots, slab_rows=8, cache_bytes=self._most_bytes
                )
            self._batch.ask(number, asked)
        except Exception as error:
            self._told(number, Ended("error", error))

    def _step(self) -> None:
        if self._batch:
            for number, told in self._batch.step():
                self._told(number, told)
        if self._alone:
            number, asked = self._alone.popleft()
            with self._with_adapters([asked.adapter]) as (model, _):
                ended = stream(
                    model,
                    self._end_ids,
                    asked,
                    lambda told: self._told(number, told),
                    lambda: number not in self._dropped and not self._at_once,
                )
            self._told(number, ended)

    def _told(self, number: int, told: Written | Ended) -> None:
        tell = self._tell.get(number)
        if isinstance(told, Ended):
            with self._changed:
                self._tell.pop(number, None)
                self._dropped.discard(number)
        else:
            self._tokens += 1
        if tell:
            tell(told)


def _free_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_bytes()
