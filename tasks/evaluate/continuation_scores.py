"""Likelihoods of endings after contexts: the scores behind multiple choice and perplexity.

A context is computed once for all its endings, and so is whatever else rows have in common at their beginning; rows
stand in one sequence without padding, and the vocabulary head runs on the places alone that an ending's tokens follow
from. An ending's last token is never computed, since nothing follows from it: endings of one token cost nothing but
their part of the head. Where a model's attention cannot be joined, or a soft prompt stands before the rows, they are
padded instead, and only rows that are the beginning of others are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.inference.prefix_tree import PrefixRow
from tasks.inference.rows import Likelihood, Scored
from tasks.models.device import upload
from tasks.models.loader import Model

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_AT_ONCE = 4096
"""What a forward pass computes, in tokens (bench/LOG.md); more for a row that is longer."""


class Continuation(NamedTuple):
    """Token ids, at least one each, of what is given and of what is scored."""

    context: Sequence[int]
    tokens: Sequence[int]


def score_continuations(
    model: Model,
    endings: Sequence[Continuation],
    *,
    tokens: int = TOKENS_AT_ONCE,
    done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """Score the likelihood of each ending, in their order.

    Args:
        model: a decoder, with or without an adapter. Edits of its prompts (ReFT) take the contexts for prompts.
        endings: what to score.
        tokens: how many a forward pass computes at most.
        done: called after each pass with the number of endings that it scored.
    """
    import torch

    from tasks.adapters.prompt_tuning import virtual_tokens
    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.inference.prefix_sharing import can_pack
    from tasks.inference.prefix_tree import batches
    from tasks.models.decoder import unwrapped

    rows = [PrefixRow([*ending.context, *ending.tokens[:-1]], len(ending.context)) for ending in endings]
    whole = prompts_of(model) is not None
    longest = max((len(row.ids) for row in rows), default=0)
    if can_pack(unwrapped(model), longest) and not virtual_tokens(model):
        passes, hidden_of = list(batches(rows, tokens, whole=whole)), _joined
    else:
        passes, hidden_of = _by_length(rows, tokens, whole=whole), _padded
    found: dict[int, Likelihood] = {}
    for numbers in passes:
        with torch.no_grad():
            hidden, places = hidden_of(model, [rows[n] for n in numbers], whole)
            scored = _score(model, hidden, places, [endings[n].tokens for n in numbers])
        found |= zip(numbers, scored, strict=True)
        done(len(numbers))
    return [found[n] for n in range(len(endings))]


def _score(
    model: Model, hidden: Tensor, places: Sequence[Sequence[int]], endings: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Score endings whose rows stand at these places of the hidden states, (places, hidden)."""
    from tasks.inference.logprobs import score_hidden

    before = [place for row, ending in zip(places, endings, strict=True) for place in row[-len(ending) :]]
    targets = [token for ending in endings for token in ending]
    found = hidden.index_select(0, upload(before, hidden.device))
    scores = score_hidden(model, found, upload(targets, hidden.device), with_likeliest=True)
    return Scored.of(scores.logp, [len(ending) for ending in endings], likeliest=scores.likeliest).likelihoods()


# --- rows in one sequence ---------------------------------------------------------------------------------------------


def _joined(model: Model, rows: Sequence[PrefixRow], whole: bool) -> tuple[Tensor, list[list[int]]]:
    """Hidden states, (places, hidden), and for each row at which places it stands."""
    from contextlib import nullcontext

    import torch

    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.inference.prefix_sharing import packed_hidden
    from tasks.inference.prefix_tree import build_batch
    from tasks.models.decoder import unwrapped

    forest = build_batch(rows, model.device, whole=whole)
    prompts = prompts_of(model)
    where = {places[0]: row.prompt for row, places in zip(rows, forest.places, strict=True)}
    shapes = ([0] * len(where), list(where), [*where.values()])
    with prompts.at(*map(torch.tensor, shapes)) if prompts else nullcontext():
        return packed_hidden(unwrapped(model), forest), forest.places


# --- rows of their own ------------------------------------------------------------------------------------------------


def _by_length(rows: Sequence[PrefixRow], tokens: int, *, whole: bool) -> list[list[int]]:
    """Group the rows' numbers into batches of at most `tokens` tokens, padding included; the longest first."""
    from tasks.inference.prefix_tree import unique_rows

    under: dict[int, list[int]] = {}
    for number, leaf in enumerate(unique_rows(rows, whole=whole)):
        under.setdefault(leaf, []).append(number)
    found, longest, count = list[list[int]](), 0, 0
    for leaf in sorted(under, key=lambda n: (-len(rows[n].ids), n)):
        if not found or (count + 1) * longest > tokens:
            found, longest, count = [*found, []], len(rows[leaf].ids), 0
        found[-1] += under[leaf]
        count += 1
    return found


def _padded(model: Model, rows: Sequence[PrefixRow], whole: bool) -> tuple[Tensor, list[list[int]]]:
    """Compute what `_joined` does, of rows padded on the right, after a soft prompt."""
    from contextlib import nullcontext

    import torch

    from tasks.adapters.prompt_tuning import virtual_tokens, with_virtual_tokens
    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.inference.encoder_decoder import padded
    from tasks.inference.prefix_tree import unique_rows
    from tasks.inference.rope import alike
    from tasks.inference.states import states_of

    leaf_of = unique_rows(rows, whole=whole)
    if len(alike(model.config, [len(row.ids) for row in rows])) > 1:
        leaf_of = list(range(len(rows)))  # a row that is the beginning of another has other positions than that
    alone = sorted(set(leaf_of))
    filled = padded([rows[n].ids for n in alone], 0, model.device)
    given = {"input_ids": filled.ids, "attention_mask": filled.attended, "use_cache": False}
    given, virtual = with_virtual_tokens(model, given)
    prompts = prompts_of(model)
    lengths = [len(rows[n].ids) + virtual_tokens(model) for n in alone]
    with prompts.given(torch.tensor([rows[n].prompt for n in alone])) if prompts else nullcontext():
        hidden = states_of(model, given, lengths)[:, virtual:]
    width = filled.ids.shape[1]
    starts = {leaf: number * width for number, leaf in enumerate(alone)}
    places = [list(range(starts[leaf], starts[leaf] + len(row.ids))) for leaf, row in zip(leaf_of, rows, strict=True)]
    return hidden.reshape(-1, hidden.shape[-1]), places
