"""The signals that ask a process to stop, and an end to work that may not come to one by itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

from tasks.core.errors import BadData

Handler: TypeAlias = Callable[[int, object], None]
STOPPING = (signal.SIGTERM, signal.SIGINT)
_handlers: list[Handler] = []


@contextmanager
def on_stop(handle: Handler) -> Iterator[None]:
    """Let SIGTERM and SIGINT only call `handle` within this block, as `signal.signal` has it."""
    before = [signal.signal(number, handle) for number in STOPPING]
    _handlers.append(handle)
    try:
        yield
    finally:
        _handlers.pop()
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def still_on_stop() -> Iterator[None]:
    """Put the handler of the surrounding `on_stop` in force again within this block, if there is one.

    Prefect puts its own in place of SIGTERM's when a flow begins. That one first tells Prefect's server of the end,
    which a signal to the whole process group has ended by then.
    """
    with on_stop(_handlers[-1]) if _handlers else nullcontext():
        yield


@contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stop the block after `seconds`, where signals can be had: in a process's main thread.

    Raises:
        BadData: `what` takes longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise BadData(f"{what} does not come to an end", got=f"more than {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
