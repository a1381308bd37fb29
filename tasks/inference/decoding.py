"""Generation in a batch that rows join and leave at any token, each with options of its own.

A pass takes one token of every row that goes on and the prompts of those that have just joined, all in one sequence
without padding (`tasks.inference.prefix_sharing`). Attention reads keys and values where they lie
(`tasks.inference.kv_cache`). What a row gets is what it gets alone, but for the rounding of products over more rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tasks.adapters.mixed_batch import mixed
from tasks.adapters.prompt_tuning import virtual_tokens
from tasks.adapters.reft.prompt_positions import Prompts, prompts_of, untouched
from tasks.core.errors import BadData
from tasks.inference.agreement import holds, is_true
from tasks.inference.kv_cache import SHORTEST, UNBOUNDED, Begun, CachedRows, KvCache, Measured, Place, Slab, in_runs
from tasks.inference.lm_head import head_of, logits_of
from tasks.inference.params import GREEDY, Generation
from tasks.inference.prefix_sharing import cached_hidden, can_pack
from tasks.inference.rope import grouped
from tasks.inference.sampling import processors, row_generator
from tasks.models.decoder import made_up_tokens, unwrapped
from tasks.models.device import host_read, upload
from tasks.models.loader import Model

PROMPT_TOKENS_AT_ONCE = 2048
"""Prompts of a pass have about so many tokens together: the next token of the other rows waits for them."""

AHEAD = 256
"""A row has room for so many more tokens than it has; then for twice as many, as long as it goes on."""


class Constraint(Protocol):
    """What may be written, such as a grammar."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (vocabulary,) bool on the host."""
        ...

    def take(self, token: int) -> None:
        """Go on after a token that was chosen."""
        ...


class Asked(NamedTuple):
    """Continuation that is asked for.

    Attributes:
        prompt: its tokens.
        max_tokens: how many are written at most.
        generation: how each is chosen.
        adapter: the name of an adapter; None: the model as it was given.
        logprobs: None: no log-probabilities; else those of each token written, and of so many of the likeliest.
        constraint: what may be written.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    generation: Generation = GREEDY
    adapter: str | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def tokens(self) -> int:
        """Return how many tokens there are at most, with the prompt's."""
        return len(self.prompt) + self.max_tokens


class Written(NamedTuple):
    """Token that was written, with log-probabilities in nats where they were asked for.

    They are the model's own: before temperature, penalties and constraints.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Ended(NamedTuple):
    """End of a continuation: "stop" after an end token, which is written too; "length", "cancelled" or "error"."""

    reason: str
    error: Exception | None = None


Inside: TypeAlias = Mapping[str | None, str | None]
"""Names of adapters that are in use, and what the model calls each whose tokens must be told from others'."""


class Together(NamedTuple):
    """Model on which some adapters are in use together."""

    model: Model
    inside: Inside


Given = Callable[[Sequence[str | None]], AbstractContextManager[Together]]
"""Gives a model for a block with the adapters of some names, or of the first and as many as can be used with it; the
name None is of the model as it is without."""


def giving(model: Model | Given) -> Given:
    """Return what gives a model for a block: the same for every name, where it is one model."""
    return (lambda names: nullcontext(Together(model, dict.fromkeys(names)))) if isinstance(model, nn.Module) else model


Told = tuple[int, Written | Ended]
"""What happened to the row of a number."""


class _Row:
    """One continuation that is being written."""

    place: Place

    def __init__(self, number: int, asked: Asked) -> None:
        self.number, self.asked = number, asked
        self.draws: torch.Generator | None = None
        self.written: list[int] = []

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the prompt and what was written."""
        return (*self.asked.prompt, *self.written)

    @property
    def kept(self) -> list[int]:
        """Return the tokens whose keys and values are kept."""
        return self.place.slab.ids[self.place.slot]

    @property
    def new(self) -> Sequence[int]:
        """Return the tokens that the next pass takes: the last one written, or what is left of the prompt."""
        missing = len(self.asked.prompt) + len(self.written) - len(self.kept)
        return self.written[-1:] if self.written and missing == 1 else self.ids[-missing:]


NO_ADAPTER: Inside = {None: None}


class DecodingBatch:
    """Continuations that are written together.

    Args:
        model: a decoder that `can_decode`, with or without an adapter; or what gives it with the adapters of some
            names for a block.
        end_ids: tokens that end a continuation.
        rows: so many are written at once, at most.
        slab_rows: rows whose keys and values lie beside each other.
        cache_bytes: keys and values take so many bytes at most.
        shortest: rows of up to so many tokens lie together.
    """

    def __init__(
        self,
        model: Model | Given,
        end_ids: Collection[int],
        *,
        rows: int,
        slab_rows: int,
        cache_bytes: int = UNBOUNDED,
        shortest: int = SHORTEST,
    ) -> None:
        self._with_adapters, self._end_ids, self._most = giving(model), frozenset(end_ids), rows
        with self._with_adapters([None]) as (bare, _):
            self._device = bare.device
            self.cache = KvCache(bytes_per_token(bare), slab_rows, cache_bytes, shortest)
        self._shares: dict[str | None, bool] = {}
        """Whether rows with an adapter may go on behind others: edits change keys by where the prompt ends."""
        self._mixes: dict[str | None, bool] = {None: True}
        """Whether an adapter's rows may be in one pass with those of others."""
        self._waiting: deque[_Row] = deque()
        self._rows: dict[int, _Row] = {}

    @property
    def going(self) -> int:
        """Count the rows that are being written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Count the rows that wait for room."""
        return len(self._waiting)

    def ask(self, number: int, asked: Asked) -> None:
        """Ask for a continuation under a number, which joins the others as soon as there is room.

        Raises:
            BadData: it would not fit alone.
        """
        if not self.cache.could_hold(asked.tokens):
            raise BadData(
                "is longer than the memory for keys and values allows",
                got=f"{len(asked.prompt)} tokens of prompt and {asked.max_tokens} to write",
                expected=f"at most {self.cache.most_tokens} together",
            )
        if asked.adapter not in self._shares:
            with self._with_adapters([asked.adapter]) as (model, _):
                self._shares[asked.adapter] = prompts_of(unwrapped(model)) is None
        self._waiting.append(_Row(number, asked))

    def leave(self, number: int) -> None:
        """Let a row leave before its end; nothing where there is none."""
        self._waiting = deque(each for each in self._waiting if each.number != number)
        if number in self._rows:
            self._end(self._rows[number])

    def step(self) -> list[Told]:
        """Write one token of each row, and of as many that wait as there is room for."""
        self._grow()
        told, begun = list[Told](), self._begin()
        self._close_gaps()
        fresh = set(begun)
        going = [row for row in self._rows.values() if row not in fresh]
        going.sort(key=lambda row: (id(row.place.slab), row.place.slot))
        left = list(dict.fromkeys(row.asked.adapter for row in self._rows.values()))
        while left:
            with self._with_adapters(self._mixing(left)) as (model, inside):
                rows, new = ([row for row in some if row.asked.adapter in inside] for some in (going, begun))
                with _edited(unwrapped(model), len(rows), new, inside):
                    logits = _next_logits(model, rows, new, inside)
            told += self._choose([*rows, *new], logits)
            left = [name for name in left if name not in inside]
        return told

    def _mixing(self, names: Sequence[str | None]) -> Sequence[str | None]:
        """Return the first of some adapters, and those whose rows may be in one pass with its."""
        for name in names if len(names) > 1 else ():
            if name not in self._mixes:
                self._mixes[name] = can_mix(self._with_adapters, name)
        first, *others = names
        return [first, *(name for name in others if self._mixes[name] and self._mixes[first])]

    def _begin(self) -> list[_Row]:
        """Take rows in that wait, in their order, as far as there is room in memory and in a pass."""
        begun, tokens = list[_Row](), 0
        while self._waiting and len(self._rows) < self._most and tokens < PROMPT_TOKENS_AT_ONCE:
            row = self._waiting[0]
            asked, ids = row.asked, row.ids
            room = min(asked.tokens, len(ids) + AHEAD)
            place = self.cache.take(asked.adapter, ids, room, share=self._shares[asked.adapter])
            if place is None:
                break
            if asked.generation.temperature > 0 and row.draws is None:
                row.draws = row_generator(asked.generation.seed, asked.prompt, self._device)
            row.place = place
            self._rows[row.number] = self._waiting.popleft()
            begun.append(row)
            tokens += len(row.new)
        return begun

    def _grow(self) -> None:
        """Give rows more room that have used up theirs; one for which there is none waits, and is computed again."""
        for row in list(self._rows.values()):
            slab = row.place.slab
            if len(row.kept) < slab.tokens:
                continue
            place = self.cache.grow(row.place, min(row.asked.tokens, 2 * slab.tokens))
            if place is None:
                self._end(row)
                self._waiting.appendleft(row)
            else:
                row.place = place

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> Iterator[Told]:
        """Choose each row's token, and end those that are at their end."""
        with host_read("each new token, which may be the last"):
            tokens = _chosen(rows, logits)
            told = [written(row.asked, own, token) for row, own, token in zip(rows, logits, tokens, strict=True)]
        for row, token, each in zip(rows, tokens, told, strict=True):
            row.written.append(token)
            if row.asked.constraint:
                row.asked.constraint.take(token)
            yield row.number, each
            stops = token in self._end_ids
            if stops or len(row.written) == row.asked.max_tokens:
                self._end(row)
                yield row.number, Ended("stop" if stops else "length")

    def _end(self, row: _Row) -> None:
        row.place.slab.going.remove(row.place.slot)
        del self._rows[row.number]

    def _close_gaps(self) -> None:
        """Let rows stand beside each other where others have ended that no new ones have taken the place of."""
        moved = {Place(slab, old): Place(slab, new) for slab in self.cache.slabs for old, new in slab.close_gaps()}
        for row in self._rows.values() if moved else ():
            row.place = moved.get(row.place, row.place)


def _next_logits(model: Model, going: Sequence[_Row], begun: Sequence[_Row], inside: Inside = NO_ADAPTER) -> Tensor:
    """Run a pass; gives the logits after each row's last token, (rows, vocabulary) float32.

    Args:
        model: with the adapters of all rows.
        going: rows whose last token is given.
        begun: rows whose prompts are.
        inside: what the model calls the rows' adapters.
    """
    base = unwrapped(model)
    ids, positions, ends = list[int](), list[int](), list[int]()
    members: dict[str, list[int]] = {}
    for row in (*going, *begun):
        new, kept, name = row.new, len(row.kept), inside[row.asked.adapter]
        if name is not None:
            members.setdefault(name, []).extend(range(len(ids), len(ids) + len(new)))
        ids += new
        positions += range(kept, kept + len(new))
        ends.append(len(ids) - 1)
    slots: dict[Slab, list[int]] = {}
    for row in going:
        slots.setdefault(row.place.slab, []).append(row.place.slot)
    runs = [(slab, run) for slab, of_slab in slots.items() for run in in_runs(of_slab)]
    prompts = [
        Begun(row.place, end + 1 - len(row.new), end + 1) for row, end in zip(begun, ends[len(going) :], strict=True)
    ]
    layout = CachedRows(runs, prompts, base.device, _dtype_of(base))
    own = {name: upload(at, base.device) for name, at in members.items()}
    with torch.no_grad(), mixed(own) if any(inside.values()) else nullcontext():
        hidden = cached_hidden(base, upload([ids], base.device), upload([positions], base.device), layout)
        last, head = hidden.index_select(0, upload(ends, base.device)), head_of(model)
        logits = head.logits(last) if head else logits_of(model, last)
    for row in (*going, *begun):
        row.kept.extend(row.new)
    return logits.float()


def _edited(base: Any, before: int, begun: Sequence[_Row], inside: Inside) -> AbstractContextManager[None]:
    """Say where prompts are in a pass, behind so many other tokens, for edits that look for them."""
    tracker: Prompts | None = prompts_of(base)
    if tracker is None:
        return nullcontext()
    if not begun:
        return tracker.nowhere()
    new, prompt = (torch.tensor(each) for each in ([len(r.new) for r in begun], [len(r.asked.prompt) for r in begun]))
    owners = [inside[row.asked.adapter] for row in begun] if any(inside.values()) else None
    return tracker.at(torch.zeros_like(new), before + new.cumsum(0) - new, prompt, owners=owners)


def _dtype_of(base: nn.Module) -> torch.dtype:
    return next(p.dtype for p in base.parameters() if p.is_floating_point())


def _chosen(rows: Sequence[_Row], logits: Tensor) -> list[int]:
    """Choose a token of each row by its options, given (rows, vocabulary)."""
    groups = grouped(_alike(number, row) for number, row in enumerate(rows))
    chosen = []
    for group in groups:
        some, scores = [rows[number] for number in group], logits
        if len(group) < len(rows):
            scores = logits.index_select(0, upload(group, logits.device))
        one = some[0]  # whose options are those of all, and which is alone where it matters what was written
        if one.asked.constraint:
            scores = scores.masked_fill(~upload(one.asked.constraint.allowed(), scores.device), -torch.inf)
        ids = upload(torch.tensor([one.written], dtype=torch.long), scores.device)
        scores = processors(one.asked.generation, [row.draws for row in some if row.draws], 0)(ids, scores)
        chosen.append(scores.argmax(dim=-1))
    tokens = torch.cat(chosen).tolist()  # the one read of a step
    by_row = dict(zip((number for group in groups for number in group), tokens, strict=True))
    return [by_row[number] for number in range(len(rows))]


def _alike(number: int, row: _Row) -> Hashable:
    """Return what rows have in common whose tokens are chosen at once: not what they have written, nor their seed."""
    how = row.asked.generation
    alone = how.repetition_penalty != 1 or row.asked.constraint is not None
    return number if alone else (how.temperature, how.top_k, how.top_p)


def written(asked: Asked, logits: Tensor, token: int) -> Written:
    """Return what was written, with log-probabilities where they are asked for; `logits` are the model's, (vocab,)."""
    if asked.logprobs is None:
        return Written(token)
    logp = logits.float().log_softmax(dim=-1)
    likeliest = logp.topk(min(asked.logprobs, len(logp)))
    top = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
    return Written(token, float(logp[token]), top)


# --- which models can -------------------------------------------------------------------------------------------------


def can_decode(model: Model, tokens: int) -> bool:
    """Return whether rows of up to `tokens` tokens can be written in a `DecodingBatch` of this model.

    Its rows can be packed, it has no soft prompt, and a few tokens written so have the logits of a whole pass.
    """
    base = unwrapped(model)
    if virtual_tokens(model) or not can_pack(base, tokens):
        return False
    return holds(base, "it can write beside other rows", partial(_written_and_whole, base))


def _written_and_whole(base: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute logits in a batch in which one row goes on while another begins, then both go on; and alone."""
    texts = [made_up_tokens(base, range(start, start + 7))[0].tolist() for start in (1, 8)]
    cache, rows = KvCache(bytes_per_token(base), rows=2), list[_Row]()
    for prompt in (5, 4, 0):
        begun = list[_Row]()
        if prompt:
            row = _Row(len(rows), Asked(tuple(texts[len(rows)][:prompt]), 7 - prompt))
            place = cache.take(None, row.ids, 7, share=True)
            if place is None:
                raise AssertionError("no room in an empty cache")
            row.place = place
            begun.append(row)
        found = _next_logits(base, rows, begun)
        rows += begun
        yield found, torch.stack([_alone(base, row.kept) for row in rows])
        for row in rows:
            row.written = texts[row.number][len(row.asked.prompt) : len(row.kept) + 1]


def _alone(base: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = base(input_ids=upload([list(ids)], base.device), use_cache=False).logits[0, -1]
    return logits.float()


def can_mix(given: Given, name: str | None) -> bool:
    """Return whether rows with an adapter can be in one pass with the base's: each gets what it gets without the other.

    Several adapters are then no other thing: none is computed with another's tokens.
    """
    if name is None:
        return True
    alone = []
    for each in (None, name):
        with given([each]) as (model, inside):
            alone.append(_made_up_rows(model, inside))
    with given([None, name]) as (model, inside):
        base = unwrapped(model)
        return len(inside) == 2 and is_true(
            base, lambda: zip(_made_up_rows(model, inside), map(torch.cat, zip(*alone, strict=True)), strict=True)
        )


def _made_up_rows(model: Model, inside: Inside) -> list[Tensor]:
    """Compute the logits of a row with each adapter after its prompt and after one token more, (rows, vocabulary)."""
    base, found = unwrapped(model), list[Tensor]()
    cache, rows = KvCache(bytes_per_token(base), rows=len(inside)), list[_Row]()
    for number, name in enumerate(inside):
        row = _Row(number, Asked(tuple(made_up_tokens(base, range(1, 6))[0].tolist()), 2, adapter=name))
        place = cache.take(name, row.ids, row.asked.tokens, share=False)
        if place is None:
            raise AssertionError("no room in an empty cache")
        row.place = place
        rows.append(row)
    for going, begun in (([], rows), (rows, [])):
        with _edited(base, len(going), begun, inside):
            found.append(_next_logits(model, going, begun, inside))
        for row in rows:
            row.written = [row.asked.prompt[0]]
    return found


def bytes_per_token(model: Model) -> int:
    """Return how many bytes the keys and values of a token take in all layers."""
    base = unwrapped(model)
    if base not in _bytes:
        measured = Measured()
        ids = made_up_tokens(base, [1])
        with untouched(base), torch.no_grad():
            cached_hidden(base, ids, torch.zeros_like(ids), measured)
        _bytes[base] = measured.bytes
    return _bytes[base]


_bytes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
