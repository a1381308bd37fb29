from __future__ import annotations

from random import Random

import pytest

from tasks.render.packing import efficiency, pack


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_packed_once_and_no_block_overflows(seed: int) -> None:
    draw = Random(seed)
    lengths = [draw.randint(1, 64) for _ in range(draw.randrange(200))]
    blocks = pack(lengths, 64)
    assert sorted(row for block in blocks for row in block) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in block) <= 64 for block in blocks)
    fewest = -(-sum(lengths) // 64)
    assert len(blocks) <= 11 / 9 * fewest + 1


def test_best_fit_by_hand() -> None:
    """7 opens a block, 5 another; 4 fits only beside 5 (one is left), 3 beside 7, 1 where one is left."""
    assert pack([3, 7, 1, 4, 5], 10) == [[1, 0], [4, 3, 2]]
    assert efficiency([3, 7, 1, 4, 5], 10) == 1.0
    assert efficiency([], 10) == 1.0
