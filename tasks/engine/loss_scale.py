"""Dynamic loss scaling, for gradients that are computed in float16 (Micikevicius et al. 2018, arXiv:1710.03740).

float16 has no numbers below 6e-8: most of a gradient would be zero. So the loss is multiplied by a factor before it is
differentiated, and the gradients are divided by it before they are clipped. The rule is torch.amp.GradScaler's, step by
step; what is not here is its own look at the gradients, for which the host would wait a second time: the loop reads
their norm anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks.models.device import choices

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_STEPS = 2000
"""So many steps in a row with finite gradients raise the factor."""


class LossScale:
    """The factor of the loss, by what became of the gradients so far.

    To checkpoints it is one more optimizer: its state is the factor, and how many steps in a row were finite.
    """

    def __init__(self) -> None:
        self.factor = FIRST
        self._finite_steps = 0
        self.param_groups: list[dict[str, Any]] = []

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide all gradients by the factor, in place; exactly, since it is a power of two."""
        import torch

        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.factor)

    @property
    def is_least(self) -> bool:
        """Return whether gradients are at most those of the loss itself: a smaller factor would help nothing."""
        return self.factor <= 1

    def update(self, *, finite: bool) -> None:
        """Take note of whether all gradients of a step were finite; those of a step that is skipped were not."""
        if not finite:
            self.factor *= BACKOFF
            self._finite_steps = 0
            return
        self._finite_steps += 1
        if self._finite_steps == GROWTH_STEPS:
            self.factor *= GROWTH
            self._finite_steps = 0

    def step(self) -> None:
        """Do nothing: the loop calls `update` once it knows the norm."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, as there is nothing to clear."""

    def state_dict(self) -> dict[str, Any]:
        """Return both numbers as scalars."""
        import torch

        factor, steps = torch.tensor(self.factor, dtype=torch.float64), torch.tensor(self._finite_steps)
        return {"state": {0: {"factor": factor, "finite_steps": steps}}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        kept = state_dict["state"][0]
        self.factor, self._finite_steps = float(kept["factor"]), int(kept["finite_steps"])


def loss_scale() -> LossScale | None:
    """Make the factor of a new training's loss where this machine computes in float16; None: it is not scaled."""
    return LossScale() if choices().scales_loss else None
