"""An engine in another process, in the place of temper's own: it is asked for continuations, and tells their tokens.

One thread has an event loop with all requests to it. When its process ends by itself, what it was writing fails, and
it is started again; requests are refused meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from http import HTTPStatus
from itertools import count
from typing import Any

import httpx

from flows.serve.engines.dialect import Dialect, EngineFailed, Event
from flows.serve.engines.pieces import Pieces
from flows.serve.engines.process import EngineProcess
from flows.serve.errors import SERVER, ApiError, place_of, unsupported
from tasks.core.errors import TemperError
from tasks.inference.continuous_batching import Busy, Handle, State, Tell
from tasks.inference.decoding import Asked, Ended

_RESTARTS = 3
"""So often an engine is started again that does not stay up for `_STEADY_S`."""
_STEADY_S = 600.0
_RETRY_S = 5
_WHOLE_S = 600.0
_DATA = "data:"


class RemoteEngine:
    """An engine of another process.

    Args:
        dialect: which one.
        start: starts a process of it.
        end_ids: tokens that end a continuation.
        pieces: the bytes of tokens.
        slots: so many are asked for at once.
        queue: so many may wait.
        say: tells of what happens to the process, in one line.
        ended: is called when it was closed.

    Raises:
        BadModel: it does not start.
    """

    def __init__(
        self,
        dialect: Dialect,
        start: Callable[[], EngineProcess],
        end_ids: Collection[int],
        pieces: Pieces,
        *,
        slots: int,
        queue: int,
        say: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        self._ended = ended
        self._dialect, self._start, self._say = dialect, start, say
        self._end_ids, self._pieces, self._most_waiting = frozenset(end_ids), pieces, queue
        self._lock, self._numbers = threading.Condition(), count()
        self._asked: dict[int, asyncio.Future[None] | None] = {}
        self._running = self._tokens = 0
        self._closing = False
        self._process: EngineProcess | None = start()
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(slots)
        # what an answer may take is the server's matter, which drops it then
        timeout, limits = httpx.Timeout(None, connect=_RETRY_S), httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        threading.Thread(target=self._run, name="requests to the engine", daemon=True).start()
        self._keeper = threading.Thread(target=self._keep_up, name="keep the engine up", daemon=True)
        self._keeper.start()

    # --- as temper's own engine ---------------------------------------------------------------------------------------

    def submit(self, asked: Asked, tell: Tell) -> Handle:
        """Ask for a continuation, whose tokens and then end are told as they come.

        Raises:
            ApiError: it cannot do what is asked for (400), or is down (503).
            Busy: too many wait, or the engine is being closed.
        """
        if field := self._dialect.refused(asked):
            raise unsupported(field, f"{field} is not supported by the engine {self._dialect.name}")
        with self._lock:
            waiting = len(self._asked) - self._running
            if self._closing or waiting >= self._most_waiting:
                raise Busy(
                    "too many requests wait",
                    got=str(waiting),
                    expected=f"at most {self._most_waiting}",
                    fix="try again",
                )
            if self._process is None:
                raise _down()
            number = next(self._numbers)
            self._asked[number] = None
        self._loop.call_soon_threadsafe(self._begin, number, asked, tell)
        return Handle(self, number)

    def drop(self, number: int) -> None:
        """Drop the request of a number; its caller is told "cancelled"."""
        with suppress(RuntimeError):  # the loop has ended, and with it every request
            self._loop.call_soon_threadsafe(self._cancel, number)

    def state(self) -> State:
        """Return what it is doing, as far as it is known here: not its memory."""
        with self._lock:
            return State(self._running, len(self._asked) - self._running, 0, 0, self._tokens)

    def close(self, *, finish: bool) -> None:
        """Take no more requests, and end the process: after those it has if `finish`, else they are cancelled."""
        with self._lock:
            self._closing = True
            if not finish:
                for number in self._asked:
                    self.drop(number)
            self._lock.wait_for(lambda: not self._asked)
            process = self._process
        if process is not None:
            process.end()
        self._keeper.join()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._ended()

    def written(self, asked: Asked) -> tuple[list[int], str]:
        """Return all tokens of a continuation at once, and why it ended.

        Raises:
            EngineFailed: it gives none.
        """
        process = self._process
        if process is None:
            raise EngineFailed("the engine has ended")
        path, body = self._dialect.request(asked, self._end_ids, stream=False)
        try:
            told = httpx.post(
                process.address + path, json=body, headers=process.headers, timeout=_WHOLE_S, trust_env=False
            )
            event = self._dialect.reader(self._end_ids, self._pieces).read(told.json())
        except (httpx.TransportError, ValueError) as error:
            raise EngineFailed("the engine gave no answer", got=type(error).__name__) from error
        return [each.token for each in event.written], event.reason

    # --- the event loop -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    def _begin(self, number: int, asked: Asked, tell: Tell) -> None:
        self._asked[number] = asyncio.ensure_future(self._answer(number, asked, tell))

    def _cancel(self, number: int) -> None:
        if task := self._asked.get(number):
            self._loop.call_soon(task.cancel)  # after its first step, without which it would tell nobody of its end

    async def _answer(self, number: int, asked: Asked, tell: Tell) -> None:
        ended = Ended("cancelled")
        running = False
        try:
            async with self._slots:
                running = True
                with self._lock:
                    self._running += 1
                reason = await self._tell_all(asked, tell)
                ended = Ended(reason) if reason else Ended("error", _down())
        except asyncio.CancelledError:
            pass  # told below: nobody waits for the task
        except httpx.TransportError:
            ended = Ended("error", _down())
        except Exception as error:  # a bad event, whatever is wrong with it
            self._say(
                f"{self._dialect.name} failed on an answer: "
                + (error.line() if isinstance(error, TemperError) else place_of(error))
            )
            ended = Ended("error", error)
        finally:
            with self._lock:
                self._running -= running
                del self._asked[number]
                self._lock.notify_all()
        tell(ended)

    async def _tell_all(self, asked: Asked, tell: Tell) -> str:
        """Tell all tokens as they come; returns why they end, or nothing where the engine stops speaking before."""
        async with aclosing(self._events(asked)) as events:
            async for event in events:
                for each in event.written:
                    self._tokens += 1
                    tell(each)
                if event.reason:
                    return event.reason
        return ""

    async def _events(self, asked: Asked) -> AsyncGenerator[Event, None]:
        process = self._process
        if process is None:  # it ended while this waited
            return
        reader = self._dialect.reader(self._end_ids, self._pieces)
        path, body = self._dialect.request(asked, self._end_ids, stream=True)
        async with self._client.stream("POST", process.address + path, json=body, headers=process.headers) as response:
            if response.status_code != HTTPStatus.OK:
                raise EngineFailed("the engine gave no answer", got=f"status {response.status_code}")
            async for line in response.aiter_lines():
                if line.startswith("error:"):
                    raise EngineFailed("the engine gave no answer", got="an error within its stream")
                text = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else ""
                if text == "[DONE]":
                    return
                if text:
                    yield reader.read(_object(text))

    # --- the process --------------------------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Start the process again when it ends by itself."""
        tried, begun = 0, time.monotonic()
        while (process := self._process) is not None:
            code = process.wait()
            with self._lock:
                if self._closing:
                    return
                self._process = None
            process.end()  # what it started
            self._say(f"{self._dialect.name} ended by itself, with code {code}")
            tried = 0 if time.monotonic() - begun > _STEADY_S else tried
            while self._process is None and not self._closing:
                if tried == _RESTARTS:
                    self._say(f"{self._dialect.name} was started {tried} times in a short while; it stays down")
                    return
                tried, begun = tried + 1, time.monotonic()
                self._start_again()

    def _start_again(self) -> None:
        try:
            process = self._start()
        except TemperError as error:
            self._say(f"{self._dialect.name} does not start again: {error.line()}")
            return
        with self._lock:
            if not self._closing:
                self._process = process
                self._say(f"{self._dialect.name} answers again")
                return
        process.end()


def _down() -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The engine has ended; try again later.",
        code="unavailable",
        kind=SERVER,
        headers={"Retry-After": str(_RETRY_S)},
    )


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EngineFailed("the engine said what is no JSON") from error
    if not isinstance(found, dict):
        raise EngineFailed("the engine said what is no event", got=type(found).__name__)
    return found
