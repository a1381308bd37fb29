"""Keys and values of rows that are being written, where they stay until the row ends: none is copied by a step.

A slab holds some rows of one length at most. Rows that go on beside each other are one attention call, by a view. Rows
that have ended stay until another one takes their slot: a prompt that begins like them goes on behind them. Slabs are
made as they are needed, and all of them together keep within a number of bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.models.device import upload

SHORTEST = 64
"""Tokens of the shortest slab, unless it is said otherwise."""

UNBOUNDED = 1 << 62
"""Bytes of a cache for rows whose number and lengths are known."""

_WORTH_COPYING = 16
"""A common beginning of fewer tokens than this is computed once more."""


class Place(NamedTuple):
    """Where a row's keys and values are."""

    slab: Slab
    slot: int


class Slab:
    """Room for `rows` rows of at most `tokens` tokens: their keys and values, (rows, heads, tokens, width) each layer.

    Attributes:
        key: what rows must share to lie in one slab, such as their adapter.
        rows: how many rows there are at most.
        tokens: how many tokens each has at most.
        going: the slots of rows that go on.
        ids: of each slot, the tokens whose keys and values are there.
    """

    def __init__(self, key: Hashable, rows: int, tokens: int) -> None:
        self.key, self.rows, self.tokens = key, rows, tokens
        self.going: set[int] = set()
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._used = [0] * rows

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, which get the form of what it makes: (1, heads, tokens, width) each."""
        if number not in self._layers:
            made = [each.new_zeros(self.rows, each.shape[1], self.tokens, each.shape[3]) for each in (key, value)]
            self._layers[number] = made[0], made[1]
        return self._layers[number]

    def take(self, prompt: Sequence[int], clock: int, *, share: bool) -> int:
        """Take a slot for a row, and keep there, or copy to it, what the prompt begins with; a token of it is left.

        Of slots that have nothing of it, it is one between rows that go on, or else the one unused for longest.

        Args:
            prompt: the row's first tokens.
            clock: a number that grows with each row.
            share: whether another row's beginning has the same keys and values.
        """
        shared = [_common(ids, prompt) if share else 0 for ids in self.ids]
        last = max(self.going, default=-1)
        free = (slot for slot in range(self.rows) if slot not in self.going)
        worth = [count if count >= _WORTH_COPYING else 0 for count in shared]
        slot = max(free, key=lambda each: (worth[each], each < last, -self._used[each]))
        donor = max(range(self.rows), key=lambda each: shared[each])
        if shared[donor] >= shared[slot] + _WORTH_COPYING:
            self._copy(donor, slot, shared[donor])
            shared[slot] = shared[donor]
        self.ids[slot] = list(prompt[: shared[slot]])
        self._used[slot] = clock
        self.going.add(slot)
        return slot

    def copy_from(self, other: Slab, source: int, slot: int) -> None:
        """Copy a row of another slab to a slot."""
        tokens = len(other.ids[source])
        for number, kept in other._layers.items():
            for mine, theirs in zip(self.layer(number, *kept), kept, strict=True):
                mine[slot, :, :tokens] = theirs[source, :, :tokens]
        self.ids[slot] = list(other.ids[source])

    def close_gaps(self) -> list[tuple[int, int]]:
        """Move rows that go on into slots between others; gives from where to where."""
        moved = []
        while self.going and max(self.going) >= len(self.going):
            last, gap = max(self.going), min(set(range(self.rows)) - self.going)
            self._copy(last, gap, len(self.ids[last]))
            self.ids[gap], self.ids[last] = self.ids[last], []
            self._used[gap] = self._used[last]
            self.going = self.going - {last} | {gap}
            moved.append((last, gap))
        return moved

    def _copy(self, one: int, other: int, tokens: int) -> None:
        for keys, values in self._layers.values():
            for each in (keys, values):
                each[other, :, :tokens] = each[one, :, :tokens]


def _common(one: Sequence[int], prompt: Sequence[int]) -> int:
    """Count the tokens that both begin with, short of the prompt's last one."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, prompt[:-1], strict=False)))


class KvCache:
    """All slabs, which keep within `most` bytes.

    Args:
        per_token: bytes of one token in all layers.
        rows: of a slab.
        most: bytes of all slabs together.
        shortest: tokens of the shortest slab; the next ones have twice as many each.
    """

    def __init__(self, per_token: int, rows: int, most: int = UNBOUNDED, shortest: int = SHORTEST) -> None:
        self._per_token, self._rows, self.most, self._shortest = per_token, rows, most, shortest
        self.slabs: list[Slab] = []
        self._clock = 0

    @property
    def bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(self._bytes_of(slab.rows, slab.tokens) for slab in self.slabs)

    def could_hold(self, tokens: int) -> bool:
        """Return whether a row of so many tokens fits at all."""
        return self._bytes_of(1, self._size(tokens)) <= self.most

    @property
    def most_tokens(self) -> int:
        """Return how many tokens a row has at most."""
        doubled = self.most // (self._per_token * self._shortest)
        return self._shortest << (doubled.bit_length() - 1) if doubled else 0

    def take(self, key: Hashable, prompt: Sequence[int], tokens: int, *, share: bool) -> Place | None:
        """Take room for a row of at most `tokens` tokens; None where there is none until another row ends."""
        self._clock += 1
        slab = self._with_room(key, self._size(tokens))
        return None if slab is None else Place(slab, slab.take(prompt, self._clock, share=share))

    def grow(self, place: Place, tokens: int) -> Place | None:
        """Move a row to where it may have `tokens` tokens; None, and all is as it was, where there is no room."""
        (old, slot), self._clock = place, self._clock + 1
        slab = self._with_room(old.key, self._size(tokens))
        if slab is None:
            return None
        found = Place(slab, slab.take((), self._clock, share=False))
        slab.copy_from(old, slot, found.slot)
        old.going.remove(slot)
        return found

    def _with_room(self, key: Hashable, size: int) -> Slab | None:
        fits = [slab for slab in self.slabs if (slab.key, slab.tokens) == (key, size) and len(slab.going) < slab.rows]
        return max(fits, key=lambda each: len(each.going), default=None) or self._new(key, size)

    def _new(self, key: Hashable, size: int) -> Slab | None:
        rows = min(self._rows, self.most // self._bytes_of(1, size))
        while self.bytes + self._bytes_of(rows, size) > self.most:
            unused = next((slab for slab in self.slabs if not slab.going), None)
            if unused is not None:
                self.slabs.remove(unused)
            elif rows > 1:
                rows -= 1
            else:
                return None
        slab = Slab(key, rows, size)
        self.slabs.append(slab)
        return slab

    def _bytes_of(self, rows: int, tokens: int) -> int:
        return rows * tokens * self._per_token

    def _size(self, tokens: int) -> int:
        size = self._shortest
        while size < tokens:
            size *= 2
        return size


# --- attention --------------------------------------------------------------------------------------------------------


class Layout(Protocol):
    """How the tokens of a pass lie in rows, which is what its attention must know."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend within rows: (1, heads, tokens, width) each, to (1, tokens, heads, width)."""
        ...


class Begun(NamedTuple):
    """Row whose prompt, or what is left of it, is in a pass: its tokens from `start` to `stop` of the sequence."""

    place: Place
    start: int
    stop: int


class CachedRows:
    """Rows of one pass: rows that go on, a token each; then prompts.

    Args:
        going: slabs, with slots beside each other that have a token in this pass.
        begun: the prompts behind them.
        device: where tensors are to be.
        dtype: of the model's numbers.
    """

    def __init__(
        self, going: Sequence[tuple[Slab, range]], begun: Sequence[Begun], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._going = [(slab, slots, *_places(slab, slots, device, dtype)) for slab, slots in going]
        self._begun = [(each, len(each.place.slab.ids[each.place.slot])) for each in begun]
        self._masks = {
            number: _behind(before, each.stop - each.start, device)
            for number, (each, before) in enumerate(self._begun)
            if before and each.stop - each.start > 1
        }

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend in each row, and keep the new keys and values: (1, heads, tokens, width) to (1, tokens, heads, width).

        Heads of queries that share one of keys stand beside each other, as more queries of it.
        """
        parts, start, groups = list[Tensor](), 0, query.shape[1] // key.shape[1]
        for slab, slots, numbers, columns, longest, mask in self._going:
            kept_keys, kept_values = slab.layer(layer, key, value)
            stop = start + len(slots)
            kept_keys[numbers, :, columns] = key[0, :, start:stop].transpose(0, 1)
            kept_values[numbers, :, columns] = value[0, :, start:stop].transpose(0, 1)
            asked = query[0, :, start:stop].transpose(0, 1).unflatten(1, (-1, groups))
            keys, values = (each[slots.start : slots.stop, :, :longest] for each in (kept_keys, kept_values))
            found = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scale)
            parts.append(found.flatten(1, 2))
            start = stop
        for number, (each, before) in enumerate(self._begun):
            place, stop = each.place, before + each.stop - each.start
            kept_keys, kept_values = (tensor[place.slot] for tensor in place.slab.layer(layer, key, value))
            kept_keys[:, before:stop] = key[0, :, each.start : each.stop]
            kept_values[:, before:stop] = value[0, :, each.start : each.stop]
            keys, values = (
                tensor[None, :, :stop].repeat_interleave(groups, dim=1) for tensor in (kept_keys, kept_values)
            )
            mask = self._masks.get(number)
            found = F.scaled_dot_product_attention(
                query[:, :, each.start : each.stop], keys, values, attn_mask=mask, is_causal=not before, scale=scale
            )
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)[None]


def _places(
    slab: Slab, slots: range, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Return where the next token of each slot goes, how many tokens the longest then has, and a mask unless all do."""
    lengths = [len(slab.ids[slot]) for slot in slots]
    numbers, columns, longest = upload(list(slots), device), upload(lengths, device), max(lengths) + 1
    if min(lengths) == max(lengths):
        return numbers, columns, longest, None
    beyond = torch.arange(longest, device=device) > columns[:, None]
    mask = torch.zeros(len(slots), 1, 1, longest, dtype=dtype, device=device)
    return numbers, columns, longest, mask.masked_fill_(beyond[:, None, None], -torch.inf)


def in_runs(slots: Sequence[int]) -> list[range]:
    """Put slots, which are in order, together that stand beside each other."""
    found: list[range] = []
    for slot in slots:
        if found and found[-1].stop == slot:
            found[-1] = range(found[-1].start, slot + 1)
        else:
            found.append(range(slot, slot + 1))
    return found


def _behind(before: int, tokens: int, device: torch.device) -> Tensor:
    """Return which tokens each of some sees that stand behind others: (tokens, before + tokens) bool."""
    return torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)


# --- how much a token takes -------------------------------------------------------------------------------------------


class Measured:
    """Stands for the rows of a pass, to learn how many bytes the keys and values of a token take."""

    def __init__(self) -> None:
        self.bytes = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Count a layer's bytes; the values stand for what attention would give."""
        self.bytes += sum(each.shape[1] * each.shape[3] * each.element_size() for each in (key, value))
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2)
