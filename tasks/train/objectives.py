"""Losses: the maths, with their papers; no files, no config.

SFT: cross-entropy on the tokens that carry the loss.
ORPO: odds-ratio preference optimisation (Hong, Lee and Thorne 2024, arXiv:2403.07691); no reference model is needed.
DPO and its kin (Rafailov et al. 2023, arXiv:2305.18290): how much more a reply has gained on a reference than another.
SimPO (Meng, Xia and Chen 2024, arXiv:2405.14734): no reference, rewards per token.
KTO (Ethayarajh et al. 2024, arXiv:2402.01306): replies are good or bad, without pairs.

Functions of DPO's kind take the margin of each pair, (pairs,), float32: the log-ratio of policy and reference of the
chosen reply minus that of the rejected one, in nats; and give a scalar, the mean over pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


def sigmoid_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Compute the loss of Rafailov et al. 2023 (arXiv:2305.18290, equation 7), of replies as wholes.

    Args:
        margin: summed over each reply's tokens.
        beta: the paper's; what margins are multiplied by to be differences of rewards.
        label_smoothing: how probable it is that a pair is the wrong way round, 0 <= label_smoothing < 0.5; as in
            Mitchell's conservative DPO: the target of the binary cross-entropy is 1 - label_smoothing.
    """
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimisation (arXiv:2310.12036, equation 17): margins are drawn to 1 / (2 beta), not beyond.

    Args:
        margin: averaged over each reply's tokens, as TRL has it on the authors' word; the paper leaves lengths open.
        beta: the paper's tau.
    """
    return (margin - 1 / (2 * beta)).square().mean()


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """Compute the hinge of SLiC (arXiv:2305.10425, equation 1) on differences of rewards, with a margin of 1.

    Args:
        margin: summed over each reply's tokens. SLiC itself has no reference; with one it is that of arXiv:2309.06657.
        beta: what margins are multiplied by; 1 / beta is the paper's delta.
    """
    return (1 - beta * margin).clamp(min=0).mean()


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Compute the loss by which chosen replies' rewards are to exceed rejected ones' by a margin (equation 6).

    Args:
        chosen_logp: length-averaged log-probability of each chosen reply, nats, (pairs,), float32, <= 0.
        rejected_logp: the same for the rejected replies.
        beta: the factor that makes rewards of these (equation 4).
        gamma: the margin, in units of the reward; TRL calls it simpo_gamma.

    Returns:
        A scalar, the mean over pairs.
    """
    return -F.logsigmoid(beta * (chosen_logp - rejected_logp) - gamma).mean()


def kl_baseline(ratio: Tensor) -> Tensor:
    """Compute how far the policy has moved from the reference (section 4.1, z_0): gains are counted from there.

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
    """Compute what is lost of the value of each reply (equations 7 and 8, without the constant lambda_y).

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
