"""The signals that ask a process to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

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
