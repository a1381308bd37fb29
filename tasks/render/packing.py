"""Rows put together into blocks of a fixed length, so that little of a block is empty."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Best-fit decreasing: the longest row first, each into the fullest block that still has room for it.

    Needs at most 11/9 of the fewest blocks, plus one (Johnson 1973).

    Args:
        lengths: tokens of each row, at most `block`.
        block: tokens that a block holds.

    Returns:
        The rows of each block, by number. Rows of one block must not attend to each other.
    """
    blocks: list[list[int]] = []
    open_blocks: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys of open_blocks, sorted
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        place = bisect_left(rooms, lengths[row])
        if place == len(rooms):
            blocks.append([])
            number, room = len(blocks) - 1, block
        else:
            room = rooms[place]
            number = open_blocks[room].pop()
            if not open_blocks[room]:
                del open_blocks[room]
                rooms.pop(place)
        blocks[number].append(row)
        left = room - lengths[row]
        if left not in open_blocks:
            insort(rooms, left)
        open_blocks.setdefault(left, []).append(number)
    return blocks


def efficiency(lengths: Sequence[int], block: int) -> float:
    """Compute the share of all packed blocks that is filled; 1 for no rows."""
    return sum(lengths) / (block * len(pack(lengths, block))) if lengths else 1.0
