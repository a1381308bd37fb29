"""What a training step must compute, and the rate at which this machine makes the products that it consists of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tasks.models.device import compute_dtype

PEAK_TOKENS = 512
"""The rows of the products that a machine's peak is told by."""


class Needed(NamedTuple):
    """Work that a step needs: no padding, and a prompt once however many replies follow it.

    Attributes:
        tokens: tokens that go through the layers.
        scored: those of them at which a token is predicted.
        pairs_attended: pairs of a token and one that it attends to.
    """

    tokens: int
    scored: int
    pairs_attended: int

    @classmethod
    def by(cls, prompt: int, replies: Sequence[int], scored: int) -> Needed:
        """Count the work of a prompt of `prompt` tokens, and the replies that follow it."""
        alone = prompt * (prompt + 1) // 2
        behind = sum(reply * prompt + reply * (reply + 1) // 2 for reply in replies)
        return cls(prompt + sum(replies), scored, alone + behind)

    @classmethod
    def of_all(cls, parts: Sequence[Needed]) -> Needed:
        """Add up the work of several parts."""
        return cls(*map(sum, zip(*parts, strict=True)))


class Operations(NamedTuple):
    """Operations of a model, forwards and backwards: for each token, scored token, and pair of tokens that attend."""

    token: int
    scored: int
    pair: int

    def of(self, needed: Needed) -> int:
        """Compute all operations that are needed."""
        return self.token * needed.tokens + self.scored * needed.scored + self.pair * needed.pairs_attended


def operations_of(model: Any) -> Operations:
    """4 operations a frozen weight and token, 6 a trained one; the head on scored tokens alone; causal attention.

    So a weight is counted once forwards, once for the gradient to its input and, if trained, once for its own. Hidden
    states that are kept from epoch to epoch are counted as if they were computed.
    """
    config = model.config.get_text_config()
    token = sum((6 if trained else 4) * rows * columns for (rows, columns), trained in matrices(model))
    heads = getattr(config, "num_attention_heads", 0)  # state space models have none
    width = heads and (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pair = 3 * 4 * config.num_hidden_layers * heads * width
    return Operations(token, 4 * config.vocab_size * config.hidden_size, pair)


def matrices(model: Any) -> Iterator[tuple[tuple[int, int], bool]]:
    """Yield the shapes of what tokens are multiplied with, without the vocabulary head, and whether each is trained."""
    head = set(model.get_output_embeddings().modules())
    for module in model.modules():
        weight = module._parameters.get("weight")  # what wraps a layer shows its weight as its own, too
        if module in head or weight is None:
            continue
        if isinstance(rows := getattr(module, "out_features", None), int):
            yield (rows, module.in_features), weight.requires_grad
        elif isinstance(getattr(module, "nf", None), int):  # GPT-2's
            yield tuple(weight.shape), weight.requires_grad


def peak_flops(model: Any) -> float:
    """Measure the best rate of the model's own products on 512 tokens, operations a second, median of five."""
    import torch
    from torch.nn import functional as F

    frozen = any(not trained for _, trained in matrices(model))
    dtype = model.dtype if frozen else compute_dtype()  # where all are trained, products are in the fast format
    device, rates = model.device, [0.0]
    for rows, columns in {shape for shape, _ in matrices(model)}:
        sizes = (rows, columns), (PEAK_TOKENS, columns)
        weight, given = (torch.ones(size, dtype=dtype, device=device) for size in sizes)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            F.linear(given, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        rates.append(2 * PEAK_TOKENS * weight.numel() / statistics.median(times[1:]))
    return max(rates)
