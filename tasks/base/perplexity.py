"""Perplexity of a model on texts that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.errors import Diverged
from tasks.models.device import autocast_to, compute_dtype, host_read, upload

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.models.loader import Model

_LARGEST_LOSS = 700.0
"""In nats; the perplexity of a larger one is no float."""


class PerplexityFigures(NamedTuple):
    """Perplexity of a model on some texts.

    Attributes:
        rows: the number of texts.
        tokens: tokens that were predicted: all but the first of each text.
        loss: nats per token.
        perplexity: e to that power; models with different vocabularies cannot be compared by it.
        bits_per_byte: bits that all tokens cost, per byte of text; those models can be compared by this.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float

    def __str__(self) -> str:
        """Format the three figures in words."""
        return (
            f"{self.loss:.4f} nats per token, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits per byte"
        )


def perplexity(
    model: Model, rows: Sequence[Sequence[int]], text_bytes: int, *, context_tokens: int, batch_tokens: int
) -> PerplexityFigures | None:
    """Score every token but the first of each row, given what stands before it.

    A row that is longer than the context is read in windows that overlap by one token, so that each token is predicted
    once.

    Args:
        model: a causal language model; it comes back in the mode that it was in.
        rows: token ids.
        text_bytes: the bytes of what the rows say.
        context_tokens: what the model reads at a time, at most.
        batch_tokens: what is computed at once, padding included, at most; or one window.

    Returns:
        The figures; None when there is nothing to predict.

    Raises:
        Diverged: the loss is not finite.
    """
    import torch

    read = sorted((window for row in rows for window in _windows(row, context_tokens)), key=len, reverse=True)
    tokens = sum(len(window) - 1 for window in read)
    if not tokens:
        return None
    nats, training = 0.0, model.training
    model.eval()
    with torch.no_grad():
        for batch in _batches(read, batch_tokens):
            padded = [[*window, *[0] * (len(batch[0]) - len(window))] for window in batch]
            width = len(batch[0]) - 1
            real = [row * width + at for row, window in enumerate(batch) for at in range(len(window) - 1)]
            logp = next_token_logp(model, upload(padded, model.device)).flatten()
            with host_read("the loss of a batch"):
                nats -= logp.index_select(0, upload(real, logp.device)).sum().item()
    model.train(training)
    loss = nats / tokens
    if not loss <= _LARGEST_LOSS:
        raise Diverged("the loss on the held-out rows is not a number that means anything", got=f"{loss} nats a token")
    return PerplexityFigures(len(rows), tokens, loss, math.exp(loss), nats / math.log(2) / max(1, text_bytes))


def next_token_logp(model: Model, ids: Tensor) -> Tensor:
    """Score every token but the first of each row, given what stands before it.

    Args:
        model: a causal language model, which computes in bf16 where this machine is fast at it.
        ids: token ids, (rows, tokens), int64, without padding on the left.

    Returns:
        Log-probabilities in nats, (rows, tokens - 1), float32. Their logits never exist as a whole.
    """
    import torch

    from tasks.inference.logprobs import score_hidden
    from tasks.inference.states import states_of

    with autocast_to(compute_dtype(), model.device):
        # all are attended to: nothing looks ahead, so what stands before padding is not touched by it
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = states_of(model, given, [ids.shape[1]] * len(ids))[:, :-1]
        logp = score_hidden(model, hidden.flatten(0, 1), ids[:, 1:].flatten()).logp
    return logp.view(len(ids), -1)


def _windows(row: Sequence[int], context_tokens: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(row) - 1, context_tokens - 1):
        yield row[start : start + context_tokens]


def _batches(windows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[Sequence[Sequence[int]]]:
    start = 0
    while start < len(windows):
        size = max(1, batch_tokens // len(windows[start]))  # the longest comes first
        yield windows[start : start + size]
        start += size
