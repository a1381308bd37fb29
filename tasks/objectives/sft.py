"""Supervised fine-tuning: cross-entropy on the tokens that carry the loss."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logp: Tensor) -> Tensor:
    """Mean negative log-likelihood.

    Args:
        logp: log-probability of each scored token, nats, (tokens,), float32, <= 0.

    Returns:
        A scalar in nats per token.
    """
    return -logp.mean()
