"""Odds-ratio preference optimisation (Hong, Lee and Thorne 2024, arXiv:2403.07691): no reference model is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_DOUBT = 1e-12
"""Log-probabilities are kept at or below minus this: at exactly 0 the odds are infinite."""


class OrpoTerms(NamedTuple):
    """The loss and its penalty, both scalars, averaged over the pairs of the batch."""

    loss: Tensor
    odds_penalty: Tensor


def orpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, chosen_nll: Tensor, *, weight: float) -> OrpoTerms:
    """Likelihood of the chosen replies plus a penalty on the odds of the rejected ones (equations 6 and 7).

    Args:
        chosen_logp: length-averaged log-probability of each chosen reply, nats, (pairs,), float32, <= 0.
        rejected_logp: the same for the rejected replies.
        chosen_nll: negative log-likelihood per token of the chosen replies, nats, scalar.
        weight: the paper's lambda; TRL calls it beta.

    Returns:
        `loss` = nll + weight * odds_penalty, where the penalty is -log sigmoid(log odds ratio).
    """
    penalty = -F.logsigmoid(log_odds_ratio(chosen_logp, rejected_logp)).mean()
    return OrpoTerms(chosen_nll + weight * penalty, penalty)


def log_odds_ratio(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """By how much the odds of the chosen replies exceed those of the rejected ones, (pairs,) (equations 4 and 5).

    Args:
        chosen_logp: length-averaged log-probability of each chosen reply, nats, (pairs,), float32, <= 0.
        rejected_logp: the same for the rejected replies.
    """
    chosen, rejected = chosen_logp.clamp(max=-LEAST_DOUBT), rejected_logp.clamp(max=-LEAST_DOUBT)
    return (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))


def _log_one_minus_exp(logp: Tensor) -> Tensor:
    """log(1 - p) from log p < 0; expm1 keeps its digits where p is close to 1, and log1p where it is close to 0."""
    likely = logp > -0.693
    near_one = torch.log(-torch.expm1(torch.where(likely, logp, -1.0)))
    near_zero = torch.log1p(-torch.exp(torch.where(likely, -1.0, logp)))
    return torch.where(likely, near_one, near_zero)
