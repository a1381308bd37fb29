"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): replies are good or bad, without pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_baseline(ratio: Tensor) -> Tensor:
    """How far the policy has moved from the reference (section 4.1, z_0): gains are counted from there.

    Args:
        ratio: log-ratio of policy and reference of replies that belong to other prompts, nats, (rows,), float32.

    Returns:
        A scalar >= 0, in nats, through which no gradient flows.
    """
    return ratio.detach().mean().clamp(min=0)


def kto_loss(
    ratio: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """What is lost of the value of each reply (equations 7 and 8, without the constant lambda_y).

    Args:
        ratio: log-ratio of policy and reference of each reply, summed over its tokens, nats, (rows,), float32.
        desirable: whether it is a good one, (rows,), bool.
        baseline: the paper's z_0, nats, scalar >= 0.
        beta: how soon the value saturates.
        desirable_weight: the paper's lambda_D.
        undesirable_weight: the paper's lambda_U.

    Returns:
        A scalar, the mean over rows of weight * (1 - sigmoid(+-beta (ratio - baseline))).
    """
    gain = beta * (ratio - baseline)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return (weight * torch.sigmoid(torch.where(desirable, -gain, gain))).mean()
