"""The rows of a training log, and what follows from them: the best step, evaluations without progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HELD_OUT_LOSS = "held_out_loss"
"""The name in the log of the loss on held-out rows."""

SAMPLES = "samples"
"""The name in the log of replies to held-out prompts."""
Log = Sequence[Mapping[str, Any]]


def best_step(log: Log) -> int | None:
    """Return the step with the lowest held-out loss, the first of equals; None where there is none."""
    seen = [row for row in log if HELD_OUT_LOSS in row]
    return min(seen, key=lambda row: row[HELD_OUT_LOSS])["step"] if seen else None


def evals_since_best(log: Log) -> int:
    """Count the held-out losses after the lowest."""
    best = best_step(log)
    return sum(HELD_OUT_LOSS in row and row["step"] > best for row in log) if best is not None else 0


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of a training log, without its step."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
