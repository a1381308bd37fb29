"""How temper ends: when its work is done, with an error, or by SIGINT, SIGTERM or SIGHUP, whatever it is doing.

A command is a nest of `with` blocks. Each ends what it started, so the order is the nest's, from within:

1. Stages, or the runs of a schedule (`flows/run/session.py`, `flows/run/schedule.py`): they are asked to stop and have
   `STOP_S` to write a checkpoint; what is left of them is killed. They come first, because they write to all the rest.
2. Prefect is told which flow runs were stopped, so that none is shown as running, or as waiting for an approval.
3. Prefect's server (`flows/run/prefect_server.py`), which nothing needs now.
4. The hold on the workspace (`flows/run/lock.py`): it is free only when nothing writes to it any more. The kernel
   frees it with the process.
5. One line on the terminal, and the process.

A signal is the exception `Stopped` in the main thread, which leaves that nest as an error does. The kernel may give a
signal to any thread (signal(7)), and only what that thread waits in is broken off; so the main thread is woken
(`_main_thread_woken`), whatever it waits in. Where Prefect runs
flows, the main thread does nothing but wait (`aside`), for two reasons. Only the main thread may set signal handlers,
so that neither a flow's nor an event loop's take the place of these. And no line of Prefect is broken off: it is left
where it is, with its threads and what it would do at the end of the interpreter, such as sending events for minutes to
a server that is gone.

What a command starts has a session of its own, so that a terminal's signals come to the command alone; and it watches
for the command's process (`tasks.core.stage.die_with_owner`), so that it ends with it by SIGKILL, too. Everything that
is waited for on the way has a limit of time, and further signals are ignored.
"""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from tasks.core.errors import Interrupted
from tasks.core.signals import STOPPING, on_stop, stopping_signals

T = TypeVar("T")

_WAKE, _LOOK_S = signal.SIGURG, 0.01
"""A signal that means nothing by itself, and how often it is sent until the main thread has heard of one that does."""


class Stopped(BaseException):
    """A signal that ends this process.

    Attributes:
        said: the line that is said of it.
        exit_code: the code that the process ends with.
    """

    def __init__(self, number: int) -> None:
        self.said = f"stopped by {signal.Signals(number).name}"
        self.exit_code = Interrupted.exit_code
        super().__init__(self.said)


_stopped: list[Stopped] = []
"""The signal that came, for where Python drops the exception: while it imports or collects garbage, for example."""


def _stop(number: int, frame: object) -> NoReturn:
    for each in stopping_signals():
        signal.signal(each, signal.SIG_IGN)
    _stopped.append(Stopped(number))
    raise _stopped[0]


@contextmanager
def stoppable(*, silent: bool = False) -> Iterator[None]:
    """Let a signal raise `Stopped` within this block; where that comes out of it, say so and end the process.

    Args:
        silent: whether the process that started this one says it.
    """
    try:
        with on_stop(_stop), _main_thread_woken():
            try:
                yield
            finally:
                _raise_stopped()
    except Stopped as stopped:
        with suppress(OSError):  # the terminal may be gone
            sys.stdout.flush()
            if not silent:
                print(stopped.said, file=sys.stderr, flush=True)
        os._exit(stopped.exit_code)


@contextmanager
def _main_thread_woken() -> Iterator[None]:
    """Break off what the main thread waits in, a lock or a child's end, when another thread took a signal that stops.

    Python writes the number of every signal to a pipe, in whichever thread it comes. A thread of this block's reads it
    and sends the main thread a signal of its own, again and again, as one that comes just before a wait begins would be
    lost.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def wake() -> None:
        while number := os.read(heard, 1):
            while number[0] in STOPPING and not _stopped:
                signal.pthread_kill(main, _WAKE)
                time.sleep(_LOOK_S)
        os.close(heard)

    main = threading.get_ident()
    handler = signal.signal(_WAKE, lambda *_: None)
    pipe = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=wake, name="wakes the main thread", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        signal.signal(_WAKE, handler)
        os.close(told)


@contextmanager
def on_stopping(what_next: str, *, exit_code: int = Interrupted.exit_code) -> Iterator[None]:
    """Say also what a user may do next, when a signal ends the process within this block.

    Args:
        what_next: that, in one sentence.
        exit_code: the code that the process ends with: 0 for what is meant to be ended by a signal.
    """
    try:
        yield
    except Stopped as stopped:
        stopped.said, stopped.exit_code = f"{stopped.said}; {what_next}", exit_code
        raise


def _raise_stopped() -> None:
    if _stopped:
        raise _stopped[0]


def aside(work: Callable[[], T], *, stop: Callable[[Stopped], object]) -> T:
    """Do some work in a thread of its own while this one, the main one, waits for it or for a signal.

    Args:
        work: what is done; it has this thread's context variables.
        stop: ends what the work has started, within a limit of time, after a signal. The thread is left as it is.
    """
    _raise_stopped()
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def do() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=do, name="work", daemon=True).start()
        return outcome.result()
    except Stopped as stopped:
        logging.disable(logging.CRITICAL)  # what fails from now on fails for being stopped
        stop(stopped)
        raise
