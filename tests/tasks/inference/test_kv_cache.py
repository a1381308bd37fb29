"""Slots of the cache: what a row has kept stays its own, whatever rows come and go beside it."""

from __future__ import annotations

import random

import pytest
import torch

from tasks.inference.kv_cache import KvCache, Slab

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
    cache, going, kept = KvCache(PER_TOKEN, rows=3, most=PER_TOKEN * 64 * 7), list[tuple[Slab, list[int]]](), 0
    for _ in range(400):
        if going and draw.random() < 0.4:
            slab, ids = going.pop(draw.randrange(len(going)))
            slab.end(slab.ids.index(ids))
        else:
            beginning = [draw.choice((1, 2))] * draw.randint(0, 40)
            prompt = [*beginning, *(draw.randrange(3, 9) for _ in range(draw.randint(1, 10)))]
            taken = cache.take("a", prompt, draw.choice((60, 100)), share=True)
            if taken is None:
                continue
            slot = taken.going - 1
            known = len(taken.ids[slot])
            assert known < len(prompt)
            assert taken.ids[slot] == prompt[:known]
            assert is_marked(taken, slot)
            kept += known
            taken.ids[slot] += prompt[known:]
            mark(taken, slot)
            going.append((taken, taken.ids[slot]))
        assert cache.bytes <= cache.most
        assert sum(slab.going for slab in cache.slabs) == len(going)
        for slab, ids in going:
            slot = next(slot for slot in range(slab.going) if slab.ids[slot] is ids)
            assert is_marked(slab, slot)
    assert kept


def test_rows_of_other_adapters_share_nothing() -> None:
    cache, prompt = KvCache(PER_TOKEN, rows=4), list(range(30))
    one = cache.take("one", prompt, 60, share=True)
    assert one is not None
    one.ids[0] += prompt
    mark(one, 0)
    again, other, apart = (
        cache.take(key, prompt, 60, share=share) for key, share in (("one", True), ("two", True), ("one", False))
    )
    assert again is one
    assert other is not one
    assert apart is one
    assert one.ids[1] == prompt[:-1]
    assert not one.ids[2]
    assert other is not None
    assert not other.ids[0]


def test_a_row_has_room_for_all_that_it_may_have() -> None:
    cache = KvCache(PER_TOKEN, rows=2, most=PER_TOKEN * 300)
    assert cache.most_tokens == 256
    assert cache.could_hold(256)
    assert not cache.could_hold(257)
    slab = cache.take(None, [1], 65, share=True)
    assert slab is not None
    assert (slab.tokens, slab.rows) == (128, 2)
    assert cache.take(None, [1], 200, share=True) is None
    slab.end(0)
    longer = cache.take(None, [1], 200, share=True)
    assert longer is not None
    assert (longer.tokens, longer.rows) == (256, 1)
    assert slab not in cache.slabs
