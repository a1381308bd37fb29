"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings of what a model reads while it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.models.loader import Model

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def noisy_embeddings(model: Model, tokens: Sequence[int], alpha: float) -> Iterator[None]:
    """Add noise to the rows of the next forward pass within this block, if the model is being trained (NEFTune).

    The noise of a row depends on how many rows came before it since the generators were seeded, and neither on padding
    nor on which rows share its pass. A soft prompt gets none; nor does what a decoder reads after an encoder.

    Args:
        model: the model.
        tokens: how long each row is, without padding, which is on the right.
        alpha: the strength of the noise; 0 is none.
    """
    if not alpha or not model.training:
        yield
        return
    from tasks.adapters.hooks import body_of
    from tasks.inference.prefix_sharing import unpack_rows

    def add(embedding: Any, args: Any, embedded: Tensor) -> Tensor:
        handle.remove()  # an encoder and its decoder may share the embedding
        return embedded + noise(embedded, tokens, alpha)

    handle = body_of(model).get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]
    try:
        with unpack_rows():
            yield
    finally:
        handle.remove()


def noise(embedded: Tensor, tokens: Sequence[int], alpha: float) -> Tensor:
    """Noise for embedded rows (rows, longest, hidden): even within +-alpha / sqrt(tokens x hidden) (Algorithm 1)."""
    import torch

    made = torch.zeros_like(embedded)
    for row, length in enumerate(tokens):
        bound = alpha / (length * embedded.shape[-1]) ** 0.5
        even = torch.rand(length, embedded.shape[-1], device=embedded.device) * 2 - 1
        made[row, :length] = bound * even
    return made
