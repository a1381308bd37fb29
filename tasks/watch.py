"""What is looked at in the course of a training, and what follows: when it stops, and which weights are kept.

Everything that follows is a function of the log alone, which is in every checkpoint: so a resumed training stops at
the same step, and keeps the same weights, as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HELD_OUT_LOSS = "held_out_loss"
"""The name in the log of the loss on held-out rows."""
SAMPLES = "samples"
"""The name in the log of replies to held-out prompts."""

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Look:
    """Something that is computed every so many steps, and after the last, from the weights that would be published.

    Attributes:
        name: under which it stands in the log.
        every_steps: how often.
        compute: what it is now; must leave the model and the random state as they were.
    """

    name: str
    every_steps: int
    compute: Callable[[], Any]


@dataclass(frozen=True)
class Watch:
    """What is looked at, and the rules for the held-out loss.

    Attributes:
        looks: in their order; only their own steps see them.
        patience: the training stops after so many looks without a lower held-out loss; None: never.
        keep_best: whether the weights with the lowest held-out loss are kept, instead of the last.
    """

    looks: Sequence[Look] = ()
    patience: int | None = None
    keep_best: bool = False

    def look(self, step: int, steps: int) -> dict[str, Any]:
        """What there is to see after a step, numbered from 1."""
        return {each.name: each.compute() for each in self.looks if step % each.every_steps == 0 or step == steps}

    def is_over(self, log: Log) -> bool:
        """Whether the rule for stopping early says so."""
        return self.patience is not None and looks_since_best(log) >= self.patience

    def kept_step(self, log: Log) -> int:
        """The step, from 1, whose weights are kept."""
        best = best_step(log) if self.keep_best else None
        return len(log) if best is None else best


def best_step(log: Log) -> int | None:
    """The step with the lowest held-out loss, the first of equals; None where there is none."""
    seen = [row for row in log if HELD_OUT_LOSS in row]
    return min(seen, key=lambda row: row[HELD_OUT_LOSS])["step"] if seen else None


def looks_since_best(log: Log) -> int:
    """How many held-out losses came after the lowest."""
    best = best_step(log)
    return sum(HELD_OUT_LOSS in row and row["step"] > best for row in log) if best is not None else 0


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of a training log, without its step."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
