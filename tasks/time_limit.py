"""An end to work that may not come to one by itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.errors import BadData


@contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stops the block after so long, where signals can be had: in a process's main thread.

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
