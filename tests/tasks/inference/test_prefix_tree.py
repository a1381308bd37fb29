"""Trees of rows against their definition: every pair of tokens asked whether some row has both, in this order."""

from __future__ import annotations

from random import Random

import pytest
import torch

from tasks.inference import prefix_tree
from tasks.inference.prefix_tree import PrefixRow, batches, build_batch, common, unique_rows

CPU = torch.device("cpu")


def rows_of(random: Random, count: int) -> list[PrefixRow]:
    """Rows over few tokens, so that they have much in common; some are the beginning of others, some alike."""
    made = [[random.randrange(3) for _ in range(random.randint(1, 12))] for _ in range(count)]
    made += [row[: random.randint(1, len(row))] for row in made[: count // 2]] + made[:3]
    return [PrefixRow(ids, random.randint(1, len(ids))) for ids in made]


def unique(rows: list[PrefixRow], *, whole: bool) -> int:
    """How many tokens there are, counted by the beginnings that they end."""
    return len(
        {
            (tuple(row.ids[: row.prompt]) if whole else (), tuple(row.ids[: n + 1]))
            for row in rows
            for n in range(len(row.ids))
        }
    )


def test_a_layout_worked_out_by_hand() -> None:
    rows = [PrefixRow([1, 2, 5], 2), PrefixRow([1, 2, 4, 6], 2), PrefixRow([1, 2], 2), PrefixRow([3], 1)]
    forest = build_batch(rows, CPU, whole=False)
    assert forest.ids.tolist() == [[1, 2, 4, 6, 5, 3]]
    assert forest.positions.tolist() == [[0, 1, 2, 3, 2, 0]]
    assert forest.places == [[0, 1, 4], [0, 1, 2, 3], [0, 1], [5]]
    (block,) = forest.blocks
    assert (block.start, block.stop, block.keys) == (0, 6, ((0, 6),))
    assert block.mask is not None
    assert block.mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("together", [1, 4, 1000])
def test_tokens_stand_once_and_attend_to_those_before_them_in_a_row(
    monkeypatch: pytest.MonkeyPatch, random: Random, together: int, whole: bool
) -> None:
    monkeypatch.setattr(prefix_tree, "TOGETHER", together)
    for count in (1, 2, 30):
        rows = rows_of(random, count)
        forest = build_batch(rows, CPU, whole=whole)
        ids, tokens = forest.ids[0].tolist(), forest.ids.shape[1]
        assert tokens == unique(rows, whole=whole)
        expected = torch.zeros(tokens, tokens, dtype=torch.bool)
        for row, places in zip(rows, forest.places, strict=True):
            assert [ids[place] for place in places] == list(row.ids)
            assert forest.positions[0, places].tolist() == list(range(len(places)))
            for n, place in enumerate(places):
                expected[place, places[: n + 1]] = True
        found = torch.zeros_like(expected)
        for block in forest.blocks:
            keys = [place for a, b in block.keys for place in range(a, b)]
            queries = range(block.start, block.stop)
            mask = torch.ones(len(queries), len(keys)).tril().bool() if block.mask is None else block.mask
            for query, attended in zip(queries, mask, strict=True):
                found[query, keys] = attended
        assert torch.equal(found, expected)
        assert [place for block in forest.blocks for place in range(block.start, block.stop)] == list(range(tokens))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 40, 10**6])
def test_batches_hold_every_row_once_and_no_more_tokens_than_they_may(random: Random, tokens: int, whole: bool) -> None:
    rows = rows_of(random, 40)
    found = list(batches(rows, tokens, whole=whole))
    assert sorted(number for batch in found for number in batch) == list(range(len(rows)))
    for batch in found:
        longest = max(len(rows[number].ids) for number in batch)
        assert unique([rows[number] for number in batch], whole=whole) <= max(tokens, longest * 5 // 4)
    if tokens == 10**6:
        assert len(found) == 1
    assert not list(batches([], tokens, whole=whole))


def test_a_batch_ends_between_questions_not_within_one() -> None:
    rows = [PrefixRow([question] * 10 + [9 + ending] * 2, 10) for question in range(7) for ending in range(4)]
    found = [sorted(batch) for batch in batches(rows, 50, whole=False)]
    assert found == [list(range(start, min(start + 8, 28))) for start in (0, 8, 16, 24)]
    long = [PrefixRow([question] * 1000 + [9 + ending] * 20, 10) for question in range(3) for ending in range(4)]
    assert [len(batch) for batch in batches(long, 50, whole=False)] == [4, 4, 4]


def test_what_rows_share_and_which_of_them_stand_for_others() -> None:
    one, other, third = PrefixRow([1, 2, 3], 2), PrefixRow([1, 2, 3, 4], 2), PrefixRow([1, 2, 3, 4], 3)
    assert [common(one, row, whole=False) for row in (one, other, third)] == [3, 3, 3]
    assert [common(one, row, whole=True) for row in (one, other, third)] == [3, 3, 0]
    assert common(PrefixRow([1, 2, 3], 2), PrefixRow([1, 4], 1), whole=False) == 1
    assert common(PrefixRow([1, 2, 3], 2), PrefixRow([1, 4, 3], 2), whole=True) == 0
    assert unique_rows([one, other, third, PrefixRow([2], 1)], whole=False) == [2, 2, 2, 3]
    assert unique_rows([one, other, third], whole=True) == [1, 1, 2]
