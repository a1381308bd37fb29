"""Progress of long work, on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from tasks.core.ranks import is_first

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
        self._bar: Any = None
        if sys.stderr.isatty() and is_first():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, unit=f" {unit}", leave=False, disable=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def go_on_from(self, done: int) -> None:
        """Count steps that an earlier attempt did."""
        self.done = self._first = done
        if self._bar:
            self._bar.update(done)

    def step(self, note: str = "", *, by: int = 1) -> None:
        """Count `by` steps; `note` is shown beside the count."""
        self.done += by
        if self._bar:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(by)
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
