"""The rank of this process among several, and how they were launched."""

from __future__ import annotations

import os
from typing import NamedTuple


class World(NamedTuple):
    """Rank of a process among those that were launched together.

    Attributes:
        rank: its number among all, from 0.
        size: how many there are.
        local_rank: its number on this machine, which is that of its GPU.
    """

    rank: int
    size: int
    local_rank: int


ALONE = World(0, 1, 0)

ZERO_OF_WEIGHTS = 3
"""The stage of ZeRO that shards weights, beside gradients and optimizer states (arXiv:1910.02054, section 5)."""
_world = ALONE


def launched() -> World:
    """Read what the launcher (torchrun, `accelerate launch`) sets in the environment."""
    rank, size, local_rank = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return World(rank, size, local_rank) if size > 1 else ALONE


def world() -> World:
    """Return this process's rank and the number of processes; alone outside of `group`."""
    return _world


def join_world(found: World) -> None:
    """Make this process one of several, or alone again."""
    global _world
    _world = found


def shards_weights() -> bool:
    """Return whether weights that are not trained are to be sharded: by FSDP, or by the third stage of ZeRO."""
    return _world != ALONE and (uses_fsdp() or uses_zero() == ZERO_OF_WEIGHTS)


def uses_fsdp() -> bool:
    """Return whether the launcher's configuration uses FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def uses_zero() -> int:
    """Return the stage of ZeRO that the launcher's configuration names; 0 without DeepSpeed."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)) if deepspeed else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and logs for all."""
    return _world.rank == 0
