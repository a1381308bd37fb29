"""The signals that ask a process to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, object], None]
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A service manager's or a pool's, Ctrl-C, and a terminal that was closed."""
_GONE_S, _LOOK_S = 1.0, 0.01


def stopping_signals() -> list[signal.Signals]:
    """Return those of STOPPING that are to stop this process: all, but not SIGHUP under `nohup`.

    SIGINT is among them also where it was ignored as this process began, as in a script's background jobs: whoever
    sends it means it.
    """
    return [each for each in STOPPING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def on_stop(handle: Handler) -> Iterator[None]:
    """Let the signals that ask this process to stop only call `handle` within this block, as `signal.signal` has it."""
    before = {number: signal.signal(number, handle) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_group(group: int) -> None:
    """Kill what is left of a process group, and wait until it is gone: the kernel takes a moment for that."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S  # where nobody reaps orphans, they stay
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            os.killpg(group, 0)
