"""Measurements of a training's use of the machine. They differ from run to run, so they are not in the log."""

from __future__ import annotations

import resource
import sys
import time


class Meter:
    """Measures from one step of a training to the next, beginning when it is made."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def since_last(self, tokens: int) -> dict[str, float]:
        """Tell of a step of so many tokens that just ended: tokens per second, and the most memory held, in MiB."""
        before, self._last = self._last, time.monotonic()
        return {"tokens_per_s": tokens / (self._last - before), "memory_peak_mib": memory_peak_bytes() / 2**20}


def memory_peak_bytes() -> int:
    """Return the most that PyTorch held on the GPU, or without one what the process had resident, until now."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
