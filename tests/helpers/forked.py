"""Processes to kill, forked from one that has imported everything, so that kills fall into work, not into imports."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext as Forks
from pathlib import Path
from typing import Any

__all__ = ["Forks", "attempt", "forks_of"]


def forks_of(*modules: str) -> Forks:
    """Processes that begin with these modules imported; the first call of a session decides."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def attempt(
    forks: Forks, work: Callable[..., None], arguments: Sequence[Any], folder: Path, kill_after_s: float | None = None
) -> bool:
    """One attempt; returns whether it came to its end."""
    folder.mkdir(exist_ok=True)
    process = forks.Process(target=work, args=tuple(str(each) for each in arguments))
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0
