"""Rows in one sequence without padding, in which a prompt that several of them begin with stands once.

A pair of replies to a prompt is laid out as [prompt | chosen | rejected]; the rejected reply's positions go on from the
prompt's end. Every token then gets exactly the hidden state that it has in a row of its own: all that is computed token
by token does not know of rows, and attention, the one place where tokens meet, is replaced by a function of our own
(transformers' AttentionInterface), which calls PyTorch's causal attention once for each row on the keys and values that
are the row's. There is no mask, and no token is computed twice except in attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.inference.agreement import holds
from tasks.inference.kv_cache import Layout
from tasks.inference.lm_head import takes_apart
from tasks.inference.prefix_tree import Block, PrefixTreeBatch, Range
from tasks.inference.rope import alike, own_frequencies
from tasks.inference.turns import in_turn
from tasks.models.decoder import decoder_of, made_up_tokens
from tasks.models.device import host_read, upload

NAME = "temper_joined"
"""What transformers calls the attention function; without a layout it is PyTorch's own, as before."""

_WORTH_IT = 0.95
"""Joined rows take an attention call each in every layer, which a twentieth of the tokens pays for (bench/LOG.md)."""


class PrefixGroup(NamedTuple):
    """Rows with the same beginning, in the joined sequence.

    Attributes:
        start: where it begins.
        trunk: so many tokens are common to all; all of the row, where it shares with none.
        branches: the lengths of what follows in each row.
    """

    start: int
    trunk: int
    branches: tuple[int, ...]


class PackedBatch(NamedTuple):
    """Rows as one sequence.

    Attributes:
        ids: (1, tokens) int64.
        positions: of each token in its row, (1, tokens) int64.
        trees: which rows share which tokens.
        places: for each row where each of its tokens stands.
    """

    ids: Tensor
    positions: Tensor
    trees: tuple[PrefixGroup, ...]
    places: list[list[int]]

    @property
    def tokens(self) -> int:
        """Return the length of the sequence in tokens."""
        return self.ids.shape[1]

    @property
    def pays(self) -> bool:
        """Return whether joining pays: whether it leaves out enough padding and repeated prompts."""
        return self.tokens <= _WORTH_IT * len(self.places) * max(map(len, self.places))


def pack(
    rows: Sequence[Sequence[int]], prompts: Sequence[int], device: torch.device, *, share: bool = True
) -> PackedBatch:
    """Lay rows out one after another, and if they may share, those with the same prompt as one tree.

    Args:
        rows: their token ids.
        prompts: how many tokens at the beginning of each row are its prompt.
        device: where the tensors are to be.
        share: whether a prompt may stand once for several rows.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = not share or not prompt
        alike.setdefault((-1 - number,) if alone else tuple(row[:prompt]), []).append(number)
    ids, positions, trees = list[int](), list[int](), list[PrefixGroup]()
    places: list[list[int]] = [[] for _ in rows]
    for numbers in alike.values():
        start, trunk = len(ids), prompts[numbers[0]]
        ids += rows[numbers[0]][:trunk]
        positions += range(trunk)
        for number in numbers:
            reply = rows[number][trunk:]
            places[number] = [*range(start, start + trunk), *range(len(ids), len(ids) + len(reply))]
            ids += reply
            positions += range(trunk, trunk + len(reply))
        trees.append(PrefixGroup(start, trunk, tuple(len(rows[number]) - trunk for number in numbers)))
    return PackedBatch(upload([ids], device), upload([positions], device), tuple(trees), places)


def packed_hidden(base: Any, joined: PackedBatch | PrefixTreeBatch) -> Tensor:
    """Compute the hidden states that a decoder ends with, (tokens, hidden); of a prefix tree without gradients."""
    layout = {"joined_trees": joined.trees} if isinstance(joined, PackedBatch) else {"joined_blocks": joined.blocks}
    return _packed_states(base, joined.ids, joined.positions, layout)


def cached_hidden(base: Any, ids: Tensor, positions: Tensor, rows: Layout) -> Tensor:
    """Compute the hidden states that a decoder ends with, (tokens, hidden), of tokens behind what rows already have.

    Args:
        base: a model that can be packed.
        ids: the new tokens of all rows, (1, tokens) int64.
        positions: of each in its row, (1, tokens) int64.
        rows: where keys and values are, and go.
    """
    return _packed_states(base, ids, positions, {"cached_rows": rows})


def _packed_states(base: Any, ids: Tensor, positions: Tensor, layout: Mapping[str, Any]) -> Tensor:
    _make_known()
    base.config._attn_implementation = NAME
    nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # a ready mask, so that none is made
    decoder: Any = decoder_of(base)
    with in_turn(base), own_frequencies(base):
        hidden: Tensor = decoder(
            input_ids=ids, position_ids=positions, attention_mask=nothing, use_cache=False, **layout
        ).last_hidden_state
    return hidden[0]


_apart = ContextVar("rows stay apart", default=False)


@contextmanager
def unpack_rows() -> Iterator[None]:
    """Pad rows instead of joining them within this block, for what reads them as they are then (NEFTune's noise)."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def can_pack(base: Any, longest: int) -> bool:
    """Return whether rows of up to `longest` tokens can be joined on this model.

    Its attention must be PyTorch's, over all that stands before, and its positions must be what we say. What its
    configuration does not say of that, a few joined tokens prove.
    """
    if _apart.get() or base.config.is_encoder_decoder or not takes_apart(base):
        return False
    config = base.config.get_text_config()
    if config._attn_implementation not in ("sdpa", NAME) or not base._supports_attention_backend or base._is_stateful:
        return False
    values = config.to_dict()
    if any(kind not in ("full_attention", "sliding_attention") for kind in values.get("layer_types") or ()):
        return False
    if values.get("use_sliding_window", True) and longest > _window(values):
        return False
    if values.get("attn_logit_softcapping") or values.get("alibi") or len(alike(config, [1, longest])) > 1:
        return False
    if not holds(base, "it can be packed", partial(_packed_and_alone, base)):
        config._attn_implementation = "sdpa"
        return False
    return True


def _window(values: Mapping[str, Any]) -> float:
    """Return how many tokens the narrowest attention looks back at, by whatever name the configuration calls that."""
    names = [name for name in values if name.endswith(("window", "window_size", "window_len", "chunk_size"))]
    return min((values[name] for name in names if isinstance(values[name], int) and values[name] > 0), default=math.inf)


def _packed_and_alone(base: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute rows in one sequence, two of which share their prompt, and the same rows alone."""
    rows = [made_up_tokens(base, row)[0].tolist() for row in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [9, 10, 11, 12])]
    prompts = [3, 3, 2]
    joined, decoder = pack(rows, prompts, base.device), decoder_of(base)
    hidden = packed_hidden(base, joined)
    for row, places in zip(rows, joined.places, strict=True):
        alone = decoder(input_ids=upload([row], base.device), use_cache=False).last_hidden_state[0]  # type: ignore[misc]
        yield hidden.index_select(0, upload(places, base.device)), alone


def drops(base: nn.Module) -> bool:
    """Return whether dropout is active in the model's present mode: a prompt that stands twice then differs."""
    if not base.training:
        return False
    values: dict[str, Any] = base.config.get_text_config().to_dict()  # type: ignore[union-attr, operator]
    of_the_layers = {key for key in values if "drop" in key and not key.startswith(("classifier", "summary"))}
    if any(isinstance(values[key], float) and values[key] > 0 for key in of_the_layers):
        return True
    return any(part.p > 0 for part in base.modules() if isinstance(part, nn.Dropout))


# --- attention --------------------------------------------------------------------------------------------------------


def _make_known() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)


_padded = ContextVar[bool | None]("whether rows are padded, where it is known", default=None)


@contextmanager
def padding_known(base: Any, *, padded: bool) -> Iterator[None]:
    """Tell a model's attention within this block whether its rows are padded, which it would read off their mask.

    The host waits for that, once a pass. Models whose attention is not ours here do wait.
    """
    token = _padded.set(padded)
    try:
        with nullcontext() if base.config._attn_implementation == NAME else host_read("whether rows are padded"):
            yield
    finally:
        _padded.reset(token)


def _mask(*, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **how: Any) -> Tensor | None:
    """Make transformers' mask, None where it can do without one: without a look at `attention_mask` if that is known.

    Rows without padding need no mask of it, and with padding there is always one.
    """
    from transformers.masking_utils import sdpa_mask

    padded = _padded.get()
    made: Tensor | None = sdpa_mask(
        attention_mask=None if padded is False else attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not padded,
        **how,
    )
    return made


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    joined_trees: tuple[PrefixGroup, ...] | None = None,
    joined_blocks: tuple[Block, ...] | None = None,
    cached_rows: Layout | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (batch, heads, tokens, width) each; returns (batch, tokens, heads, width).

    Args:
        module: the layer that attends.
        query: of all tokens.
        key: the same; there may be fewer heads of keys and values than of queries.
        value: the same.
        attention_mask: left to PyTorch's own attention; trees need none.
        joined_trees: how the one sequence is made of rows; None for any other batch.
        joined_blocks: the same of a `PrefixTreeBatch`.
        cached_rows: the same of rows that are being written.
        more: what the layer has to say besides.
    """
    if cached_rows is not None:
        return cached_rows.attend(module.layer_idx, query, key, value, more["scaling"]), None  # type: ignore[arg-type]
    if joined_trees is None and joined_blocks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return found
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    how = {"scale": more["scaling"], "dropout_p": more["dropout"]}
    if joined_trees is None:
        # transposed before they are put together: so the layer need not copy it once more
        parts = [_of_block(block, query, key, value, how).transpose(1, 2) for block in joined_blocks or ()]
        return torch.cat(parts, dim=1), None
    # split, not sliced: the gradient of a slice is as large as all that it is a slice of
    tokens = [tree.trunk + sum(tree.branches) for tree in joined_trees]
    of_trees = zip(*(tensor.split(tokens, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        part
        for tree, of_tree in zip(joined_trees, of_trees, strict=True)
        for part in _of_tree(tree, of_tree, {**how, "is_causal": True})
    ]
    return torch.cat([part.transpose(1, 2) for part in outputs], dim=1), None  # one copy, and of the layout asked for


def _of_tree(tree: PrefixGroup, of_tree: Sequence[Tensor], how: dict[str, Any]) -> list[Tensor]:
    """Attend in the trunk with the first branch; then in each other branch, behind the trunk's tokens.

    The trunk's queries run along again, since PyTorch's causal attention wants as many queries as keys; what comes of
    them is dropped.
    """
    first, *others = zip(
        *(tensor.split([tree.trunk + tree.branches[0], *tree.branches[1:]], dim=2) for tensor in of_tree), strict=True
    )
    outputs = [F.scaled_dot_product_attention(*first, **how)]
    for other in others:
        q, k, v = (torch.cat([t[:, :, : tree.trunk], u], dim=2) for t, u in zip(first, other, strict=True))
        outputs.append(F.scaled_dot_product_attention(q, k, v, **how)[:, :, tree.trunk :])
    return outputs


def _of_block(block: Block, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
    """Attend in neighbouring tokens, behind those that all rows through them begin with."""
    queries = query[:, :, block.start : block.stop]
    keys, values = (_at(tensor, block.keys) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=block.mask, is_causal=block.mask is None, **how
    )


def _at(tensor: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Select the tokens of some ranges, (batch, heads, tokens, width)."""
    parts = [tensor[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
