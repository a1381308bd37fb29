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


def smoothed_loss(logp: Tensor, mean_logp: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with targets that are partly spread over the vocabulary (arXiv:1512.00567, section 7).

    Args:
        logp: log-probability of each scored token, nats, (tokens,), float32, <= 0.
        mean_logp: the mean over the vocabulary in its place, nats, (tokens,).
        smoothing: the paper's epsilon: that share of each target lies evenly on all words, 0 <= smoothing < 1.

    Returns:
        A scalar in nats per token: (1 - smoothing) H(q, p) + smoothing H(u, p).
    """
    return (1 - smoothing) * sft_loss(logp) + smoothing * sft_loss(mean_logp)
