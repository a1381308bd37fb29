"""Token rows, and what a forward pass says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
    """Log-probabilities of scored tokens: `logp` (tokens,) in nats, float32; `row` (tokens,) says whose each is.

    `mean_logp` (tokens,) is the mean over the vocabulary in their places, and `likeliest` (tokens,) bool says which of
    them are the arg-max, where they were asked for.
    """

    logp: Tensor
    row: Tensor
    rows: int
    mean_logp: Tensor | None = None
    likeliest: Tensor | None = None

    def row_sums(self) -> Tensor:
        """Sum the log-probabilities of each row's scored tokens, (rows,)."""
        return self.logp.new_zeros(self.rows).index_add(0, self.row, self.logp)

    def row_means(self) -> Tensor:
        """Average the log-probabilities of each row's scored tokens, (rows,)."""
        return self.row_sums() / self.row_tokens()

    def row_tokens(self) -> Tensor:
        """Count the scored tokens of each row, (rows,)."""
        return self.row.bincount(minlength=self.rows)

    def likelihoods(self) -> list[Likelihood]:
        """Return the likelihood of each row.

        Raises:
            ValueError: `likeliest` was not computed.
        """
        if self.likeliest is None:
            raise ValueError("scored without with_likeliest")
        logp = self.logp.double()
        sums = logp.new_zeros(self.rows).index_add(0, self.row, logp)
        missed = self.row[~self.likeliest].bincount(minlength=self.rows)
        return [Likelihood(*each) for each in zip(sums.tolist(), (missed == 0).tolist(), strict=True)]
