"""The signals that ask a process to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_stop(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Within this block SIGTERM and SIGINT do nothing but call `handle`, as `signal.signal` has it."""
    before = [signal.signal(number, handle) for number in STOPPING]
    try:
        yield
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)
