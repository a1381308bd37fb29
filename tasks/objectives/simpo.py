"""Simple preference optimisation (Meng, Xia and Chen 2024, arXiv:2405.14734): no reference, rewards per token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, *, beta: float, gamma: float) -> Tensor:
    """The chosen reply's reward is to exceed the rejected one's by a margin (equation 6).

    Args:
        chosen_logp: length-averaged log-probability of each chosen reply, nats, (pairs,), float32, <= 0.
        rejected_logp: the same for the rejected replies.
        beta: what these are multiplied by to be rewards (equation 4).
        gamma: the margin, in units of the reward; TRL calls it simpo_gamma.

    Returns:
        A scalar, the mean over pairs.
    """
    return -F.logsigmoid(beta * (chosen_logp - rejected_logp) - gamma).mean()
