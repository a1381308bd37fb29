"""The vocabulary head and the log-probabilities of some tokens in one pass, without ever holding their logits.

A row's softmax times the head's weight is what attention computes, with the hidden states for queries and the weight
for both keys and values. So it is computed as flash attention computes it (Dao et al. 2022, arXiv:2205.14135, algorithm
1): tile after tile of the vocabulary, with a running maximum, sum and product. And since a token's log-probability
depends on its own hidden state alone, its gradient is one vector per token, whatever the loss makes of the
log-probabilities: it falls out of the same pass, and the backward pass only scales it. Two products of matrices, no
tile computed twice.

On a GPU it is the fused kernel of Liger (Hsu et al. 2024, arXiv:2410.10989) where that package is installed, made for
the card (tasks/models/capability.py) and has what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tasks.models.device import autocast_dtype, choices, has_fast_bf16, without_autocast

TILE_TOKENS = 512
TILE_VOCABULARY = 4096
"""A tile of logits: as many rows as keep a product of matrices busy, and no more columns than a cache holds."""


class Head(NamedTuple):
    """Head that makes logits of hidden states: z = scale (W h + b), then cap tanh(z / cap).

    Attributes:
        weight: (vocabulary, hidden).
        bias: (vocabulary,).
        scale: factor of the logits; Cohere multiplies by it, Granite divides.
        cap: soft cap of the logits, as in Gemma 2 (arXiv:2408.00118, section 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, (tokens, hidden) to (tokens, vocabulary)."""
        return scaled_and_capped(torch.nn.functional.linear(hidden, self.weight, self.bias), self.scale, self.cap)


def scaled_and_capped(output: Tensor, scale: float, cap: float | None) -> Tensor:
    """Make logits of what a head's product gives: scale z, then cap tanh(z / cap)."""
    scaled = output if scale == 1 else output * scale
    return scaled if cap is None else (scaled / cap).tanh() * cap


class TokenScores(NamedTuple):
    """Scores of each token, (tokens,), nats, float32 (float64 for hidden states in float64).

    Attributes:
        logp: its log-probability.
        mean_logp: the mean log-probability of all tokens that could stand in its place; None if it was not computed.
        likeliest: whether none is likelier, nor as likely with a smaller id, bool; None if it was not computed.
    """

    logp: Tensor
    mean_logp: Tensor | None
    likeliest: Tensor | None = None


def score_targets(
    hidden: Tensor, head: Head, targets: Tensor, *, with_mean: bool = False, with_likeliest: bool = False
) -> TokenScores:
    """Score each target's log-probability given its hidden state; differentiable once, also to weight and bias.

    Args:
        hidden: (tokens, hidden).
        head: the head that makes logits of them.
        targets: token ids, (tokens,) int64.
        with_mean: whether to compute the means over the vocabulary, as label smoothing needs them.
        with_likeliest: whether to compute if each target is the arg-max.
    """
    if hidden.is_cuda and not with_mean and not with_likeliest and not _observers and _suits_liger(hidden, head):
        return TokenScores(_by_liger(hidden, head, targets), None)
    needed = torch.is_grad_enabled() and hidden.requires_grad
    how = _How(head.scale, head.cap, product_dtype(hidden, head), with_mean, with_likeliest, needed)
    return TokenScores(*_Scores.apply(hidden, head.weight, head.bias, targets, how))  # type: ignore[no-untyped-call]


def score_logits(
    logits: Tensor, targets: Tensor, *, with_mean: bool = False, with_likeliest: bool = False
) -> TokenScores:
    """Score each target's log-probability from logits that exist already, (tokens, vocabulary)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = -F.cross_entropy(logits, targets, reduction="none")
    mean = logits.mean(1) - logits.logsumexp(1) if with_mean else None
    return TokenScores(logp, mean, logits.argmax(1) == targets if with_likeliest else None)


def product_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """Return the dtype of products: that of the weights or of autocast, but float32 on CPUs without a bf16 unit.

    Without AMX a product in bf16 takes twice as long as in float32 (bench/LOG.md); weights are widened tile by tile.
    """
    dtype = autocast_dtype(hidden.device) or head.weight.dtype
    slow = hidden.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not has_fast_bf16()
    return torch.float32 if slow else dtype


def _suits_liger(hidden: Tensor, head: Head) -> bool:
    """Return whether Liger's kernel is chosen here and knows this form of logits: it scales none, we cap ours."""
    known = head.cap is None and (head.scale == 1.0 or head.bias is None)
    return known and choices(hidden.device).head == "liger"


def _by_liger(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    given = (hidden * head.scale).to(head.weight.dtype)
    nats = liger_fused_linear_cross_entropy(
        given, head.weight, targets, head.bias, reduction="none", accum_dtype=torch.float32
    )
    logp: Tensor = -nats.float()
    return logp


_observers: list[Callable[[Tensor], None]] = []


@contextmanager
def observed(see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show every tile of logits to `see` as it is made, within this block; the estimate counts them so."""
    _observers.append(see)
    try:
        yield
    finally:
        _observers.remove(see)


class _How(NamedTuple):
    """Options of scoring: the form of the logits, the dtype of products, what to compute besides each token's score."""

    scale: float
    cap: float | None
    dtype: torch.dtype
    with_mean: bool
    with_likeliest: bool
    gradient: bool


class _Upstream(NamedTuple):
    """Gradients of the loss to the log-probabilities and to the means, (tokens, 1)."""

    logp: Tensor
    mean: Tensor | None


class _Tile(NamedTuple):
    """Logits of some tokens over some of the vocabulary.

    Attributes:
        tokens: which.
        columns: of the vocabulary.
        weight: of these columns, (columns, hidden), in the type of products.
        logits: (tokens, columns), float32 or float64; to be changed in place.
        slope: how a capped logit follows the one before capping, (tokens, columns); None without a cap.
    """

    tokens: slice
    columns: slice
    weight: Tensor
    logits: Tensor
    slope: Tensor | None

    def place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column in this tile, and whether it is in it at all; both (tokens, 1)."""
        column = targets[self.tokens, None] - self.columns.start
        inside = (column >= 0) & (column < self.logits.shape[1])
        return column.clamp(0, self.logits.shape[1] - 1), inside


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Iterator[_Tile]:
    """Yield all tiles; those of the same columns one after another. `hidden` is in the dtype of products."""
    scale, cap = how.scale, how.cap
    for start in range(0, len(weight), TILE_VOCABULARY):
        columns = slice(start, min(start + TILE_VOCABULARY, len(weight)))
        part = weight[columns].to(hidden.dtype)
        for first in range(0, len(hidden), TILE_TOKENS):
            tokens = slice(first, min(first + TILE_TOKENS, len(hidden)))
            logits = torch.mm(hidden[tokens], part.t()).to(_wide(hidden.dtype))
            for see in _observers:
                see(logits)
            if bias is not None:
                logits.add_(bias[columns])
            if scale != 1.0:
                logits.mul_(scale)
            slope = None
            if cap is not None:
                logits.div_(cap).tanh_()
                slope = logits.square().neg_().add_(1)
                logits.mul_(cap)
            yield _Tile(tokens, columns, part, logits, slope)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product that is computed in the dtype of its right side."""
    if to.dtype == right.dtype:
        to.addmm_(left, right)
    else:
        to.add_(torch.mm(left.to(right.dtype), right))


class _Scores(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = hidden.to(how.dtype)
        sums = _Sums(given, targets, how)
        with without_autocast(hidden.device):
            for tile in _tiles(given, weight, bias, how):
                sums.take(tile)
        log_total = sums.log_total()
        ctx.how = how
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, *sums.slopes(weight, how.scale))
        mean = None if sums.all is None else (sums.all / len(weight) - log_total)[:, 0]
        likeliest = None if sums.likeliest is None else sums.likeliest[:, 0]
        if likeliest is not None:
            ctx.mark_non_differentiable(likeliest)
        return (sums.target - log_total)[:, 0], mean, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_mean: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_total, slopes, mean_slopes = ctx.saved_tensors
        upstream = _Upstream(of_logp[:, None], of_mean[:, None] if of_mean is not None and ctx.how.with_mean else None)
        to_hidden = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_hidden = upstream.logp * slopes
            if upstream.mean is not None:
                to_hidden.addcmul_(upstream.mean, mean_slopes)
            to_hidden = to_hidden.to(hidden.dtype)
        if any(ctx.needs_input_grad[1:3]):
            with without_autocast(hidden.device):
                to_weight, to_bias = _to_head(hidden, weight, bias, targets, log_total, upstream, ctx.how)
        return to_hidden, to_weight, to_bias, None, None


def _to_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    log_total: Tensor,
    upstream: _Upstream,
    how: _How,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of weight and bias: each tile is remade, and all tokens are added up before rounding."""
    given = hidden.to(how.dtype)
    to_weight, to_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    of_both = upstream.logp if upstream.mean is None else upstream.logp + upstream.mean
    rows = given.new_zeros(0)
    for tile in _tiles(given, weight, bias, how):
        now = tile.tokens
        column, inside = tile.place(targets)
        slope = tile.logits.sub_(log_total[now]).exp_().mul_(-of_both[now])
        if upstream.mean is not None:
            slope.add_(upstream.mean[now] / len(weight))
        slope.scatter_add_(1, column, torch.where(inside, upstream.logp[now], 0))
        if tile.slope is not None:
            slope.mul_(tile.slope)
        slope.mul_(how.scale)
        if now.start == 0:
            rows = torch.zeros_like(tile.weight, dtype=slope.dtype)
        _add_product(rows, slope.t(), given[now])
        if now.stop == len(given):
            to_weight[tile.columns] = rows
        if to_bias is not None:
            to_bias[tile.columns] += slope.sum(0)
    return to_weight, to_bias


class _Sums:
    """Sums over the vocabulary for each token, all (tokens, 1) or (tokens, hidden)."""

    def __init__(self, hidden: Tensor, targets: Tensor, how: _How) -> None:
        def zeros(columns: int) -> Tensor:
            return hidden.new_zeros(len(hidden), columns, dtype=wide)

        wide, width = _wide(hidden.dtype), hidden.shape[1]
        self.targets = targets
        self.most = zeros(1).fill_(torch.finfo(wide).min)
        self.total = zeros(1)  # of exp(logit - most)
        self.target, self.target_slope = zeros(1), zeros(1)
        self.likeliest = zeros(1).bool() if how.with_likeliest else None  # of the columns so far
        self.all = zeros(1) if how.with_mean else None  # of the logits
        self.pulled = (
            zeros(width) if how.gradient else None
        )  # of exp(logit - most) times the slope and the weight's row
        self.rows = zeros(width) if how.gradient and how.with_mean else None  # of the slope times the weight's row

    def take(self, tile: _Tile) -> None:
        """Add a tile, whose logits it uses up."""
        now, logits = tile.tokens, tile.logits
        column, inside = tile.place(self.targets)
        found = logits.gather(1, column)
        self.target[now] += torch.where(inside, found, 0)
        slope = 1 if tile.slope is None else tile.slope.gather(1, column)
        self.target_slope[now] += torch.where(inside, slope, 0)
        if self.all is not None:
            self.all[now] += logits.sum(1, keepdim=True)
        here = logits.amax(1, keepdim=True)
        most = torch.maximum(self.most[now], here)
        if self.likeliest is not None:
            leads = inside & (found == here) & (here > self.most[now])
            if logits.device.type == "cpu":
                rows = leads[:, 0].nonzero()[:, 0]  # few: only there it matters which of equal logits comes first
                leads[rows] = logits[rows].argmax(1, keepdim=True) == column[rows]
            else:  # where how many they are would have to be waited for
                leads &= logits.argmax(1, keepdim=True) == column
            self.likeliest[now] = leads | (self.likeliest[now] & (here <= self.most[now]))
        shrunk = (self.most[now] - most).exp_()
        self.most[now] = most
        weights = logits.sub_(most).exp_()
        self.total[now] = self.total[now] * shrunk + weights.sum(1, keepdim=True)
        if self.pulled is not None:
            weights = weights if tile.slope is None else weights.mul_(tile.slope)
            _add_product(self.pulled[now].mul_(shrunk), weights, tile.weight)
        if self.rows is not None and tile.slope is None:
            self.rows[now] += tile.weight.sum(0, dtype=self.rows.dtype)
        elif self.rows is not None and tile.slope is not None:
            _add_product(self.rows[now], tile.slope, tile.weight)

    def log_total(self) -> Tensor:
        """Compute the logarithm of the sum of all exponentials, (tokens, 1)."""
        return self.most + self.total.log()

    def slopes(self, weight: Tensor, scale: float) -> tuple[Tensor | None, Tensor | None]:
        """Compute each log-probability's gradient to its hidden state, (tokens, hidden), and that of each mean."""
        if self.pulled is None:
            return None, None
        expected = self.pulled.div_(self.total)
        mean = None if self.rows is None else self.rows.div_(len(weight)).sub_(expected).mul_(scale)
        return (weight[self.targets] * self.target_slope).sub_(expected).mul_(scale), mean
