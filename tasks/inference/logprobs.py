"""Log-probabilities of the target tokens of rows: packed without padding where the model allows it, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tasks.inference.encoder_decoder import PairRow, score_pairs
from tasks.inference.rendered_rows import Row
from tasks.inference.rows import Scored, TokenRow
from tasks.models.device import upload
from tasks.models.loader import Model

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.inference.frozen_layer_cache import FrozenLayerCache
    from tasks.inference.linear_cross_entropy import TokenScores
    from tasks.inference.prefix_sharing import PackedBatch


JOINED, PADDED, BY_LENGTH, WHOLE = "joined", "padded", "one length at a time", "as a whole"
"""How rows of a decoder are computed: in one sequence, beside each other, in batches of one length, or by a forward
pass that makes all logits."""


def find_out(model: Model) -> str:
    """Find out how a model's rows can be computed, by a few tokens: once, and before anything else is done to it.

    Those of an encoder-decoder are padded, and nothing need be tried.

    Raises:
        BadModel: it cannot be run on text alone, or looks ahead.
    """
    from tasks.inference.lm_head import takes_apart
    from tasks.inference.prefix_sharing import can_pack
    from tasks.inference.states import pads
    from tasks.models.decoder import unwrapped

    base = unwrapped(model)
    if base.config.is_encoder_decoder:
        return PADDED
    packs, whole = can_pack(base, 1), not takes_apart(base)
    if not pads(base):
        return BY_LENGTH
    return JOINED if packs else WHOLE if whole else PADDED


def score_rows(
    model: Model, rows: Sequence[Row], below: FrozenLayerCache | None = None, *, with_mean: bool = False
) -> Scored:
    """Score the log-probability of every scored token of some rows, which are all of one kind.

    `below` keeps what a decoder's adapter cannot change; `with_mean` also gives the mean over the vocabulary.
    """
    if pairs := [row for row in rows if isinstance(row, PairRow)]:
        return score_pairs(model, pairs, with_mean=with_mean)
    return score_tokens(model, [row for row in rows if isinstance(row, TokenRow)], below, with_mean=with_mean)


def score_tokens(
    model: Model, rows: Sequence[TokenRow], below: FrozenLayerCache | None = None, *, with_mean: bool = False
) -> Scored:
    """Score the log-probability of every scored token of some rows, given what stands before it.

    The vocabulary head runs on scored positions only, and tile by tile: logits never exist as a whole. Rows stand in
    one sequence without padding, and those with the same prompt share it, where the model and its adapter allow that.
    Nor is anything computed twice that `below` keeps. `with_mean` also gives `mean_logp`.
    """
    from tasks.inference.states import together
    from tasks.models.decoder import unwrapped

    if below and len(together(unwrapped(model), [row.tokens for row in rows])) > 1:
        below = None  # what it keeps is put in for a whole batch
    joined = _joined(model, rows) if below is None else None
    hidden = _joined_hidden(model, rows, joined) if joined else _padded_hidden(model, rows, below)
    targets = [token for row in rows for token, counts in zip(row.ids[1:], row.mask[1:], strict=True) if counts]
    scores = score_hidden(model, hidden, upload(targets, model.device), with_mean=with_mean)
    return Scored.of(scores.logp, [row.scored_tokens for row in rows], scores.mean_logp)


def score_hidden(
    model: Model,
    hidden: Tensor,
    targets: Tensor,
    *,
    with_mean: bool = False,
    with_likeliest: bool = False,
) -> TokenScores:
    """Score each target's log-probability, as the model gives it for what `states_of` gives of the token before.

    Args:
        model: a decoder, with or without an adapter.
        hidden: of each token, (tokens, hidden), or its logits, (tokens, vocabulary), if the model is run as a whole.
        targets: token ids, (tokens,) int64.
        with_mean: whether to compute the means over the vocabulary, as label smoothing needs them.
        with_likeliest: whether to compute if each target is the arg-max.
    """
    from tasks.inference.linear_cross_entropy import score_logits, score_targets
    from tasks.inference.lm_head import head_of, logits_of, takes_apart

    asked = {"with_mean": with_mean, "with_likeliest": with_likeliest}
    if not takes_apart(model):
        return score_logits(hidden, targets, **asked)
    if head := head_of(model):
        return score_targets(hidden, head, targets, **asked)
    return score_logits(logits_of(model, hidden), targets, **asked)


def _joined(model: Model, rows: Sequence[TokenRow]) -> PackedBatch | None:
    """Join the rows in one sequence, where the model and its adapter allow that and it pays; else return None."""
    from tasks.adapters.prompt_tuning import virtual_tokens
    from tasks.inference.prefix_sharing import can_pack, drops, pack
    from tasks.models.decoder import unwrapped

    base = unwrapped(model)
    longest = max(row.tokens for row in rows)
    if virtual_tokens(model) or not can_pack(base, longest):
        return None
    prompts = [row.prompt_tokens for row in rows]
    joined = pack([row.ids for row in rows], prompts, model.device, share=not drops(base))
    return joined if joined.pays else None


def _joined_hidden(model: Model, rows: Sequence[TokenRow], joined: PackedBatch) -> Tensor:
    """Compute the hidden states that scored tokens follow from, (tokens, hidden), of rows joined in one sequence."""
    import torch

    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.inference.prefix_sharing import packed_hidden
    from tasks.models.decoder import unwrapped

    prompts = prompts_of(model)
    shapes = ([0] * len(joined.trees), *zip(*(tree[:2] for tree in joined.trees), strict=True))
    with prompts.at(*map(torch.tensor, shapes)) if prompts else nullcontext():
        hidden = packed_hidden(unwrapped(model), joined)
    before = [
        place
        for row, places in zip(rows, joined.places, strict=True)
        for place, counts in zip(places[:-1], row.mask[1:], strict=True)
        if counts
    ]
    return hidden.index_select(0, upload(before, hidden.device))


def _padded_hidden(model: Model, rows: Sequence[TokenRow], below: FrozenLayerCache | None) -> Tensor:
    """Compute the same hidden states of rows padded on the right, after a soft prompt and what `below` keeps."""
    import torch

    from tasks.adapters.prompt_tuning import virtual_tokens, with_virtual_tokens
    from tasks.inference.states import states_of

    prompts = [row.prompt_tokens for row in rows]
    with below.known([row.ids for row in rows], prompts) if below else nullcontext() as reuse:
        start = reuse.start if reuse else [0] * len(rows)
        longest = max(len(row.ids) - first for row, first in zip(rows, start, strict=True))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attended = torch.zeros(len(rows), longest, dtype=torch.long)
        scored = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, first) in enumerate(zip(rows, start, strict=True)):
            ids[i, : len(row.ids) - first] = torch.tensor(row.ids[first:])
            attended[i, : len(row.ids) - first] = 1
            scored[i, : len(row.mask) - first] = torch.tensor(row.mask[first:])
        scored[:, 0] = False  # nothing stands before the first token
        ids, attended = (upload(t, model.device) for t in (ids, attended))
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        lengths = [len(row.ids) - first + virtual_tokens(model) for row, first in zip(rows, start, strict=True)]
        if reuse and reuse.cache:
            given["attention_mask"] = torch.cat([reuse.attended, attended], dim=1)
            given["position_ids"] = upload(torch.tensor(start)[:, None] + torch.arange(longest), ids.device)
            given["past_key_values"] = reuse.cache
            lengths = [length + first for length, first in zip(lengths, start, strict=True)]
        given, virtual = with_virtual_tokens(model, given)
        with _prompt_ends(model, prompts, start):
            hidden = states_of(model, given, lengths)
    places = scored.roll(-1, dims=1).nonzero()  # position t predicts token t + 1
    before = upload(places[:, 0] * (virtual + longest) + virtual + places[:, 1], hidden.device)
    return hidden.flatten(0, 1).index_select(0, before)


def _prompt_ends(model: Model, lengths: Sequence[int], start: Sequence[int]) -> Any:
    import torch

    from tasks.adapters.reft.prompt_positions import prompts_of

    prompts = prompts_of(model)
    if prompts is None:
        return nullcontext()
    return prompts.given(torch.tensor(lengths), torch.tensor(start))
