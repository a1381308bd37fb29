"""Slots of the cache: what a row has kept stays its own, whatever rows come and go beside it."""

from __future__ import annotations

import random

import pytest
import torch

from tasks.inference.kv_cache import KvCache, Place, Slab

PER_TOKEN = 8


def mark(slab: Slab, slot: int) -> None:
    """Write each token's own number for its keys, and its square for its values."""
    keys, values = slab.layer(0, torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 3))
    for place, token in enumerate(slab.ids[slot]):
        keys[slot, :, place], values[slot, :, place] = token, token**2


def is_marked(slab: Slab, slot: int) -> bool:
    keys, values = slab.layer(0, torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 3))
    ids = torch.tensor(slab.ids[slot], dtype=torch.float)
    length = len(ids)
    return bool((keys[slot, :, :length, 0] == ids).all() and (values[slot, :, :length, 2] == ids**2).all())


@pytest.mark.parametrize("seed", range(4))
def test_every_row_keeps_its_own_through_any_course_of_events(seed: int) -> None:
    draw = random.Random(seed)
    cache, going, kept, moves = KvCache(PER_TOKEN, rows=3, most=PER_TOKEN * 64 * 7), dict[Place, list[int]](), 0, 0
    for _ in range(400):
        if going and draw.random() < 0.4:
            place = draw.choice(list(going))
            del going[place]
            place.slab.going.remove(place.slot)
        else:
            beginning = [draw.choice((1, 2))] * draw.randint(0, 40)
            prompt = [*beginning, *(draw.randrange(3, 9) for _ in range(draw.randint(1, 10)))]
            taken = cache.take("a", prompt, draw.choice((60, 100)), share=True)
            if taken is None:
                continue
            assert taken not in going
            ids = taken.slab.ids[taken.slot]
            assert ids == prompt[: len(ids)] != prompt
            assert is_marked(taken.slab, taken.slot)
            kept += len(ids)
            ids += prompt[len(ids) :]
            mark(taken.slab, taken.slot)
            going[taken] = prompt
        if draw.random() < 0.3:
            moved = {Place(slab, old): Place(slab, new) for slab in cache.slabs for old, new in slab.close_gaps()}
            going = {moved.get(place, place): ids for place, ids in going.items()}
            moves += len(moved)
            assert all(slab.going == set(range(len(slab.going))) for slab in cache.slabs)
        assert cache.bytes <= cache.most
        assert {(slab, slot) for slab in cache.slabs for slot in slab.going} == set(going)
        for place, ids in going.items():
            assert place.slab.ids[place.slot] == ids
            assert is_marked(place.slab, place.slot)
    assert kept
    assert moves


def test_a_row_goes_on_behind_one_that_has_ended_and_takes_gaps_first() -> None:
    cache, prompt = KvCache(PER_TOKEN, rows=4), list(range(40))
    places = [cache.take(None, [*prompt[:20], 100 + n, *prompt], 64, share=n > 0) for n in range(3)]
    for place in places:
        assert place is not None
        place.slab.ids[place.slot] += [*prompt[:20], 100 + place.slot, *prompt][len(place.slab.ids[place.slot]) :]
        mark(place.slab, place.slot)
    assert [place and place.slot for place in places] == [0, 1, 2]
    slab = cache.slabs[0]
    slab.going -= {0, 1}
    goes_on = cache.take(None, [*slab.ids[1], 7, 8], 64, share=True)
    assert goes_on == (slab, 1)
    assert len(slab.ids[1]) == 61
    assert cache.take(None, [200, 201], 64, share=True) == (slab, 0)
    assert cache.take(None, [*prompt[:20], 100, *prompt], 64, share=True) == (slab, 3)
    assert len(slab.ids[3]) == 20  # what was behind that has been overwritten
    assert is_marked(slab, 3)


def test_rows_of_other_adapters_share_nothing() -> None:
    cache, prompt = KvCache(PER_TOKEN, rows=4), list(range(30))
    one = cache.take("one", prompt, 60, share=True)
    assert one is not None
    one.slab.ids[0] += prompt
    mark(one.slab, 0)
    again, other, apart = (
        cache.take(key, prompt, 60, share=share) for key, share in (("one", True), ("two", True), ("one", False))
    )
    assert again == (one.slab, 1)
    assert apart == (one.slab, 2)
    assert one.slab.ids[1:3] == [prompt[:-1], []]
    assert other is not None
    assert other.slab is not one.slab
    assert not other.slab.ids[0]


def test_a_row_has_room_for_all_that_it_may_have() -> None:
    cache = KvCache(PER_TOKEN, rows=2, most=PER_TOKEN * 300)
    assert cache.most_tokens == 256
    assert cache.could_hold(256)
    assert not cache.could_hold(257)
    place = cache.take(None, [1], 65, share=True)
    assert place is not None
    assert (place.slab.tokens, place.slab.rows) == (128, 2)
    assert cache.take(None, [1], 200, share=True) is None
    place.slab.going.clear()
    longer = cache.take(None, [1], 200, share=True)
    assert longer is not None
    assert (longer.slab.tokens, longer.slab.rows) == (256, 1)
    assert place.slab not in cache.slabs
