"""Direct preference optimisation and its kin: a loss of how much more a reply has gained on a reference than another.

Every function takes the margin of each pair, (pairs,), float32: the log-ratio of policy and reference of the chosen
reply minus that of the rejected one, in nats; and gives a scalar, the mean over pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def sigmoid_loss(margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """The loss of Rafailov et al. 2023 (arXiv:2305.18290, equation 7), of replies as wholes.

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
    """The hinge of SLiC (arXiv:2305.10425, equation 1) on differences of rewards, with a margin of 1.

    Args:
        margin: summed over each reply's tokens. SLiC itself has no reference; with one it is that of arXiv:2309.06657.
        beta: what margins are multiplied by; 1 / beta is the paper's delta.
    """
    return (1 - beta * margin).clamp(min=0).mean()
