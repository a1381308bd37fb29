"""Monitoring and early stopping of a training: what is measured, when it stops, and which weights are kept.

Everything that follows is a function of the log alone, which is in every checkpoint: so a resumed training stops at
the same step, and keeps the same weights, as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.reports.training_log import Log, best_step, evals_since_best


@dataclass(frozen=True)
class EvalHook:
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
class EvalHooks:
    """Measurements in the course of a training, and the rules for the held-out loss.

    Attributes:
        looks: the measurements in their order, each at its own steps.
        patience: the training stops after this many looks without a lower held-out loss; None: never.
        keep_best: whether the weights with the lowest held-out loss are kept, instead of the last.
    """

    looks: Sequence[EvalHook] = ()
    patience: int | None = None
    keep_best: bool = False

    def look(self, step: int, steps: int) -> dict[str, Any]:
        """Measure what is due after a step, numbered from 1."""
        return {each.name: each.compute() for each in self.looks if step % each.every_steps == 0 or step == steps}

    def is_over(self, log: Log) -> bool:
        """Return whether the rule for early stopping ends the training."""
        return self.patience is not None and evals_since_best(log) >= self.patience

    def kept_step(self, log: Log) -> int:
        """Return the step, from 1, whose weights are kept."""
        best = best_step(log) if self.keep_best else None
        return len(log) if best is None else best
