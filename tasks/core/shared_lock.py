"""A lock that threads hold together, or one of them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident


class SharedLock:
    """Held by any number of threads together, or by one alone. Who waits to be alone is not overtaken by others.

    A thread may take it again within a block of its own, but not alone within one in which it shares.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._holders: Counter[int] = Counter()
        self._alone = 0
        self._waiting = 0

    def shares_here(self) -> bool:
        """Return whether this thread is in a block that others may share, and in none of its own."""
        return get_ident() in self._holders and self._alone != get_ident()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it in this block, together with others that do."""
        me = get_ident()
        with self._changed:
            self._changed.wait_for(lambda: me in self._holders or not (self._alone or self._waiting))
            self._holders[me] += 1
        try:
            yield
        finally:
            self._leave(me)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it in this block when nobody else does.

        Raises:
            RuntimeError: this thread shares it already, so that it would wait for itself.
        """
        me = get_ident()
        if self.shares_here():
            raise RuntimeError("this thread shares the lock already")
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._holders.keys() - {me})
            self._waiting -= 1
            self._alone = me
            self._holders[me] += 1
        try:
            yield
        finally:
            self._leave(me)

    def _leave(self, me: int) -> None:
        with self._changed:
            self._holders[me] -= 1
            if not self._holders[me]:
                del self._holders[me]
                self._alone = 0
                self._changed.notify_all()
