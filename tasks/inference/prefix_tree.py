"""Many rows as a tree of their common beginnings: every token that rows share is laid out, and computed, once.

Sorted rows have most in common with their neighbours, so the tree falls out of comparing each row with the one before
it. Laid out in that order, all that follows from a token stands right behind it, and a token attends to another exactly
if that one stands before it and its descendants reach this far. The layout serves reading a model, not training it:
`shared_prompts` has the one for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.models.device import upload

TOGETHER = 128
"""Small branches attend in one call, up to so many tokens: what they mask costs less than calls (bench/LOG.md)."""


class PrefixRow(NamedTuple):
    """Token ids, of which the first `prompt` are a prompt."""

    ids: Sequence[int]
    prompt: int


Range = tuple[int, int]
"""Neighbouring tokens: the first, and after the last."""


class Block(NamedTuple):
    """Neighbouring tokens that attend in one call.

    Attributes:
        start: the first of them in the sequence.
        stop: after the last.
        keys: the ranges of what they attend to: the beginning that all rows through them have, and themselves.
        mask: which token attends to which of these, (tokens, keys), bool; None: each to all up to itself.
    """

    start: int
    stop: int
    keys: tuple[Range, ...]
    mask: Tensor | None


class PrefixTreeBatch(NamedTuple):
    """Rows as one sequence.

    Attributes:
        ids: (1, tokens) int64.
        positions: of each token in its rows, (1, tokens) int64.
        blocks: how they attend; together they are the sequence, in its order.
        places: for each row where each of its tokens stands.
    """

    ids: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    places: list[list[int]]


def ordered(rows: Sequence[PrefixRow], *, whole: bool) -> list[int]:
    """Sort the rows' numbers so that rows with the same beginning stand together; `whole` as in `common`."""
    return sorted(range(len(rows)), key=lambda n: (rows[n].ids[: rows[n].prompt if whole else 0], rows[n].ids))


def common(one: PrefixRow, other: PrefixRow, *, whole: bool) -> int:
    """Count the tokens that two rows may share at their start; if `whole`, none unless they have the same prompt."""
    length = min(len(one.ids), len(other.ids))
    if one.ids[:length] == other.ids[:length]:
        same = length
    else:
        same = next(n for n, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b)
    return same if not whole or same >= one.prompt == other.prompt else 0


def batches(rows: Sequence[PrefixRow], tokens: int, *, whole: bool) -> Iterator[list[int]]:
    """Yield the numbers of the rows in batches of at most `tokens` tokens, shared ones counted once.

    A row that is longer gets a batch, and with it rows that add up to a quarter: its context's other endings. A batch
    ends in its second half, where the next one has the fewest tokens to repeat for each that this one holds.
    """
    order = ordered(rows, whole=whole)
    shared = [0, *(common(rows[a], rows[b], whole=whole) for a, b in pairwise(order))]
    start = 0
    while start < len(order):
        held, ends = len(rows[order[start]].ids), list[tuple[float, int]]()
        stop, most = start + 1, max(tokens, 5 * held // 4)
        while stop < len(order) and held + len(rows[order[stop]].ids) - shared[stop] <= most:
            if 2 * held >= most:
                ends.append((shared[stop] / held, -stop))
            held += len(rows[order[stop]].ids) - shared[stop]
            stop += 1
        if stop < len(order):
            stop = -min([*ends, (shared[stop] / held, -stop)])[1]
        yield order[start:stop]
        start = stop


def build_batch(rows: Sequence[PrefixRow], device: torch.device, *, whole: bool) -> PrefixTreeBatch:
    """Lay rows out as one sequence; `whole` as in `common`."""
    ids, positions, last = list[int](), list[int](), list[int]()
    places: list[list[int]] = [[] for _ in rows]
    before: int | None = None
    for number in ordered(rows, whole=whole):
        row = rows[number]
        same = 0
        if before is not None:
            same = common(rows[before], row, whole=whole)
            for place in places[before][same:]:
                last[place] = len(ids)
            places[number] = places[before][:same]
        places[number] = [*places[number], *range(len(ids), len(ids) + len(row.ids) - same)]
        ids += row.ids[same:]
        positions += range(same, len(row.ids))
        last += [0] * (len(row.ids) - same)
        before = number
    last = [place or len(ids) for place in last]
    blocks = tuple(_blocks(last, 0, len(ids), ()))
    with_masks = tuple(block._replace(mask=_mask(block, last, device)) for block in blocks)
    return PrefixTreeBatch(upload([ids], device), upload([positions], device), with_masks, places)


def unique_rows(rows: Sequence[PrefixRow], *, whole: bool) -> list[int]:
    """Return for each row the number of one that it is a prefix of, itself or another: only those must be computed."""
    order, found = ordered(rows, whole=whole), list(range(len(rows)))
    for number, following in reversed(list(pairwise(order))):
        if common(rows[number], rows[following], whole=whole) == len(rows[number].ids):
            found[number] = found[following]
    return found


def _blocks(last: Sequence[int], start: int, stop: int, before: tuple[Range, ...]) -> Iterator[Block]:
    """Yield blocks of neighbouring subtrees that follow `before`; `last` gives where each token's descendants end."""
    while start < stop:
        end = last[start]
        while end < stop and last[end] - start <= TOGETHER:
            end = last[end]
        if end - start <= TOGETHER:
            yield Block(start, end, _longer(before, (start, end)), None)
        else:  # one large subtree: what all of it begins with, then the rest behind that
            trunk = start + 1
            while trunk < end and last[trunk] == end:
                trunk += 1
            through = _longer(before, (start, trunk))
            yield Block(start, trunk, through, None)
            yield from _blocks(last, trunk, end, through)
        start = end


def _longer(ranges: tuple[Range, ...], by: Range) -> tuple[Range, ...]:
    """With another range at the end; two that meet become one, which can be read without copying."""
    if ranges and ranges[-1][1] == by[0]:
        return *ranges[:-1], (ranges[-1][0], by[1])
    return *ranges, by


def _mask(block: Block, last: Sequence[int], device: torch.device) -> Tensor | None:
    straight = all(place == last[block.start] for place in last[block.start : block.stop])
    count = sum(stop - start for start, stop in block.keys) - (block.stop - block.start)
    if straight and not count:
        return None
    here = torch.arange(block.start, block.stop)
    reach = torch.tensor(last[block.start : block.stop])
    among = (here <= here[:, None]) & (here[:, None] < reach)
    return upload(torch.cat([torch.ones(len(here), count, dtype=torch.bool), among], dim=1), device)
