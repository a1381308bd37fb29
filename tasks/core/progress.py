"""Progress of long work, on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.core.ranks import is_first

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

T = TypeVar("T")

LINE_EVERY_S = 5.0


class Progress:
    """Counts the steps of one piece of work.

    Args:
        label: what is being done.
        total: how many steps there are.
        unit: what a step is, in the plural.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._first, self._started, self._told = 0, time.monotonic(), 0.0
        self._bar = _bar(label, total, unit) if sys.stderr.isatty() and is_first() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def go_on_from(self, done: int) -> None:
        """Count steps that an earlier attempt did."""
        self.done = self._first = done
        if self._bar:
            self._bar.update(_THE_TASK, completed=done)

    def step(self, note: str = "", *, by: int = 1) -> None:
        """Count `by` steps; `note` is shown beside the count."""
        self.done += by
        if self._bar:
            self._bar.update(_THE_TASK, advance=by, note=note)
            return
        now = time.monotonic()
        if is_first() and (now - self._told >= LINE_EVERY_S or self.done >= self.total):
            self._told = now
            rate = (self.done - self._first) / max(now - self._started, 1e-9)
            text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s"
            print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, one step each."""
        for item in items:
            yield item
            self.step()


_THE_TASK: Any = 0
"""The one task of a bar; rich numbers them from 0."""


def _bar(label: str, total: int, unit: str) -> RichProgress:
    """Start a bar, which is gone again when it stops; what is printed meanwhile stands above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=_console(),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays as it is
    )
    bar.add_task(label, total=total, note="")
    bar.start()
    return bar


@cache
def _console() -> Console:
    """Return the terminal that all bars share, so that they stand below one another."""
    from rich.console import Console

    return Console(stderr=True)
