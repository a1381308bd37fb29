"""Running out of memory: telling it from other errors, and saying what would fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tasks.core.errors import OutOfMemory

T = TypeVar("T")
GIB = 2**30
_RAN_OUT = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|Cannot allocate memory")
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMG]iB)?")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_COUNTERS = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
    Path("/proc/vmstat"),
)

_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error))))


def asked_bytes(error: BaseException) -> int | None:
    """Return how many bytes were requested when memory ran out; None where the error does not state it."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2] or "bytes"]) if found else None


def kills_for_memory(counters: tuple[Path, ...] = _COUNTERS) -> int:
    """Count the processes that the kernel has ended here for lack of memory; only its growth means something."""
    for counter in counters:
        if counter.is_file() and (found := re.search(r"^oom_kill (\d+)$", counter.read_text(), re.MULTILINE)):
            return int(found[1])
    return 0


def free_bytes() -> int:
    """Return the host memory that this process could still have: within machine, control group and its own limit."""
    import resource

    import psutil

    free = [psutil.virtual_memory().available]
    for limit, used in _LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            free.append(int(text) - int(used.read_text()))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        free.append(most - psutil.Process().memory_info().vms)
    return max(0, min(free))


def out_of_memory(error: BaseException, *, where: str, fix: str) -> OutOfMemory:
    """Build the error of a failed allocation: what was held and requested, and what is free."""
    import psutil
    import torch

    asked, on_gpu = asked_bytes(error), isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_bytes()
    more = f"{readable_bytes(asked)} more" if asked is not None else "more"
    return OutOfMemory(
        "memory ran out" + (" on the GPU" if on_gpu else ""),
        where=where,
        got=f"{readable_bytes(free)} free",
        expected=f"{more} than the {readable_bytes(held)} that were held",
        fix=fix,
    )


def readable_bytes(size: int) -> str:
    """Format bytes for people and programs."""
    return f"{size / GIB:.2f} GiB ({size} bytes)"


@contextmanager
def explain_out_of_memory(*, where: str, fix: str) -> Iterator[None]:
    """Turn an out-of-memory failure within this block into one clear error.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise out_of_memory(error, where=where, fix=fix) from error
