"""Training examples of an objective, made of rows: sequences, and which of their tokens count."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rendered_rows import Row
from tasks.inference.rows import TokenRow
from tasks.train.params import AnyObjective, KtoObjective, OrpoObjective

Example = tuple[Row, ...]
"""What one row of the data gives to learn from: one sequence, or a chosen and a rejected one with the same prompt."""


def parts_of(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Split the examples in their order into parts of `size`."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def target_tokens(examples: Sequence[Example], objective: AnyObjective) -> int:
    """Count the tokens of the likelihood that is a part of the loss, or is logged beside it."""
    return sum(row.scored_tokens for row in positive_sequences(examples, objective))


def positive_sequences(examples: Sequence[Example], objective: AnyObjective) -> list[Row]:
    """Return the sequences to become likely, scored where the likelihood is: of KTO's replies the good ones."""
    first = [example[0] for example in examples]
    if isinstance(objective, KtoObjective):
        return [row for row in first if isinstance(row, TokenRow) and row.desirable]
    return [_with_prompt(row) for row in first] if learns_prompts(objective) else first


def learns_prompts(objective: AnyObjective) -> bool:
    """Return whether the likelihood is also of prompts."""
    return isinstance(objective, OrpoObjective) and objective.likelihood == "prompt_and_reply"


def _with_prompt(row: Row) -> Row:
    return row if isinstance(row, PairRow) else row._replace(mask=[False] + [True] * (row.tokens - 1))


def replies_of(examples: Sequence[Example]) -> list[TokenRow]:
    """Return the sequences of examples that a decoder reads: of pairs all chosen ones, then all rejected ones."""
    by_place = zip(*examples, strict=True)
    return [row for rows in by_place for row in rows if isinstance(row, TokenRow)]


def mismatched_pairs(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Pair every prompt of a step with the reply of another row of it (section 4.1 of arXiv:2402.01306).

    Replies move on by one, as in TRL, in an order that depends on the rows' contents alone. None is made longer than
    the longest of the rows, so that a model can read it in the memory that there is. One row alone gives none.
    """
    longest = max(row.tokens for row in rows)
    ordered = sorted(rows, key=lambda row: blake2b(array("q", row.ids).tobytes(), digest_size=16).digest())
    found = []
    for row, other in zip(ordered, ordered[-1:] + ordered[:-1], strict=True):
        prompt, reply = row.ids[: row.prompt_tokens], other.ids[other.prompt_tokens :]
        ids = [*prompt, *reply][:longest]
        found.append(TokenRow(ids, [n >= len(prompt) for n in range(len(ids))], len(prompt)))
    return found if len(found) > 1 else []


def reference_sequences(steps: Iterable[Sequence[Example]], objective: AnyObjective) -> Iterator[TokenRow]:
    """All rows that a reference is asked for over these steps, step by step."""
    for step in steps:
        replies = replies_of(step)
        yield from replies
        if isinstance(objective, KtoObjective):
            yield from mismatched_pairs(replies)
