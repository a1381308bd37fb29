from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest

from tasks.core.shared_lock import SharedLock


@pytest.fixture
def others() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def shares(lock: SharedLock, until: Event, entered: Event) -> None:
    with lock.shared():
        entered.set()
        assert until.wait(5)


def is_alone(lock: SharedLock, entered: Event) -> None:
    with lock.alone():
        entered.set()


def waits(future: Future[None]) -> bool:
    try:
        future.result(0.1)
    except TimeoutError:
        return True
    return False


def test_it_is_held_together_or_alone(others: ThreadPoolExecutor) -> None:
    lock, end, entered, alone = SharedLock(), Event(), Event(), Event()
    with lock.shared():
        sharing = others.submit(shares, lock, end, entered)
        assert entered.wait(5)
        waiting = others.submit(is_alone, lock, alone)
        assert waits(waiting)
    assert waits(waiting)
    end.set()
    sharing.result(5)
    waiting.result(5)
    assert alone.is_set()


def test_who_waits_to_be_alone_is_not_overtaken_but_by_who_shares_already(others: ThreadPoolExecutor) -> None:
    lock, end, alone, late = SharedLock(), Event(), Event(), Event()
    end.set()
    with lock.shared():
        waiting = others.submit(is_alone, lock, alone)
        assert waits(waiting)
        overtaking = others.submit(shares, lock, end, late)
        assert waits(overtaking)
        with lock.shared():  # else it would wait for itself
            assert not alone.is_set()
    waiting.result(5)
    overtaking.result(5)


def test_it_may_be_taken_again_but_not_alone_where_it_is_shared() -> None:
    lock = SharedLock()
    with lock.alone():
        with lock.alone(), lock.shared():
            pass
        assert not lock.shares_here()
    with lock.shared():
        assert lock.shares_here()
        with pytest.raises(RuntimeError, match="shares the lock already"), lock.alone():
            pass
    with lock.alone():  # all of it is given back
        pass
