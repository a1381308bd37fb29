"""Timing of benchmarks: two programs by turns in one process, and a description of the machine."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("TEMPER_REAL_DATA", ROOT.parent / "shared" / "data"))
"""Real public files, where they lie beside the clone."""


class Ratio(NamedTuple):
    """Rounds of theirs / ours; more than 1 means that ours is faster.

    Attributes:
        ratios: one per round.
        ours_s: seconds of each round.
        theirs_s: seconds of each round.
    """

    ratios: list[float]
    ours_s: list[float]
    theirs_s: list[float]

    def row(self) -> str:
        """Median, least, bootstrap 90% interval of the median, and both medians in seconds, as cells of a table."""
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(self.ratios, k=len(self.ratios))) for _ in range(2000))
        interval = f"{medians[100]:.2f} to {medians[1899]:.2f}"
        return (
            f"{statistics.median(self.ratios):.2f} | {min(self.ratios):.2f} | {interval} | "
            f"{statistics.median(self.ours_s):.2f} | {statistics.median(self.theirs_s):.2f}"
        )


def alternate(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> Ratio:
    """Run both by turns after one warm-up each; who begins changes from round to round."""
    ours()
    theirs()
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for mine in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            (ours if mine else theirs)()
            times[mine].append(time.perf_counter() - started)
    ratios = [other / own for own, other in zip(times[True], times[False], strict=True)]
    return Ratio(ratios, times[True], times[False])


def machine() -> str:
    """Describe the processor, its fast number formats, and the load before the start."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    bf16 = ", ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags) or "no fast bf16"
    return f"{platform.machine()}, {os.cpu_count()} cores, {bf16}, load {os.getloadavg()[0]:.2f}"
