"""Token rows, and what a forward pass says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from tasks.models.device import host_read, upload

if TYPE_CHECKING:
    from torch import Tensor


class TokenRow(NamedTuple):
    """Token ids with a loss mask of the same length; the prompt is the part before the first scored token.

    `desirable` is the label of a labelled reply (KTO); other rows have none, and are all desirable.
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    prompt_tokens: int
    desirable: bool = True

    @property
    def tokens(self) -> int:
        """Return the length of the row in tokens."""
        return len(self.ids)

    @property
    def scored_tokens(self) -> int:
        """Count the tokens that the loss falls on; nothing stands before the first."""
        return sum(self.mask[1:])


class Likelihood(NamedTuple):
    """Likelihood of a row's scored tokens: their log-probability in nats, and whether greedy decoding gives them."""

    logp: float
    greedy: bool


class Scored(NamedTuple):
    """Log-probabilities of the scored tokens of some rows, row after row.

    Attributes:
        logp: of each token, (tokens,) in nats, float32.
        tokens: how many each row has, which the host knows.
        row: which row each is of, (tokens,) int64, where `logp` is.
        mean_logp: the mean over the vocabulary in their places, (tokens,), where it was asked for.
        likeliest: which of them are the arg-max, (tokens,) bool, where it was asked for.
    """

    logp: Tensor
    tokens: Sequence[int]
    row: Tensor
    mean_logp: Tensor | None = None
    likeliest: Tensor | None = None

    @classmethod
    def of(
        cls, logp: Tensor, tokens: Sequence[int], mean_logp: Tensor | None = None, likeliest: Tensor | None = None
    ) -> Self:
        """Make it of log-probabilities and how many of them each row has."""
        row = [number for number, count in enumerate(tokens) for _ in range(count)]
        return cls(logp, tokens, upload(row, logp.device), mean_logp, likeliest)

    def of_rows(self, rows: Sequence[int]) -> Tensor:
        """Return the log-probabilities of some rows' tokens, (tokens,)."""
        import torch

        parts = self.logp.split(list(self.tokens))
        return torch.cat([self.logp[:0], *(parts[row] for row in rows)])

    def row_sums(self) -> Tensor:
        """Sum the log-probabilities of each row's scored tokens, (rows,)."""
        return self.logp.new_zeros(len(self.tokens)).index_add(0, self.row, self.logp)

    def row_means(self) -> Tensor:
        """Average the log-probabilities of each row's scored tokens, (rows,)."""
        return self.row_sums() / self.row_tokens()

    def row_tokens(self) -> Tensor:
        """Count the scored tokens of each row, (rows,)."""
        return upload(self.tokens, self.logp.device)

    def likelihoods(self) -> list[Likelihood]:
        """Return the likelihood of each row.

        Raises:
            ValueError: `likeliest` was not computed.
        """
        if self.likeliest is None:
            raise ValueError("scored without with_likeliest")
        import torch

        nothing = self.logp.new_zeros(len(self.tokens), dtype=torch.float64)
        sums = nothing.index_add(0, self.row, self.logp.double())
        missed = nothing.index_add(0, self.row, (~self.likeliest).double())
        with host_read("the likelihoods of a batch"):
            both = torch.stack([sums, missed], dim=1).tolist()
        return [Likelihood(logp, missed == 0) for logp, missed in both]
