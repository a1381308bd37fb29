"""Graphics cards that are not here, by what their makers say of them: for estimates, of which none is a measurement.

Dense matrix products (no sparsity) with sums in float32, from NVIDIA's data sheets of V100, T4, A10, A100, L4, L40S,
H100, H200 and HGX B200, and its white papers of GA102 (RTX 3090) and Ada (RTX 4090). Memory is what the driver leaves.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tasks.models.capability import Capability, DtypeName, choose


class Card(NamedTuple):
    """A card.

    Attributes:
        name: NVIDIA's.
        capability: the compute capability, by which all choices are made.
        memory_gib: of the card, with error correction where that is on by default.
        half_tflops: 10^12 operations a second in bfloat16; in float16 where there is no bfloat16.
        single_tflops: the same in float32.
        gb_per_s: 10^9 bytes a second, between the card and its memory.
    """

    name: str
    capability: Capability
    memory_gib: float
    half_tflops: float
    single_tflops: float
    gb_per_s: float

    @property
    def dtype(self) -> DtypeName:
        """Return the dtype that is computed in on it."""
        return choose(self.capability).dtype


CARDS = {
    "v100": Card("Tesla V100 SXM2 32 GB", (7, 0), 32.0, 125.0, 15.7, 900),
    "t4": Card("Tesla T4", (7, 5), 15.0, 65.0, 8.1, 320),
    "a100-40gb": Card("A100 SXM4 40 GB", (8, 0), 40.0, 312.0, 19.5, 1555),
    "a100": Card("A100 SXM4 80 GB", (8, 0), 80.0, 312.0, 19.5, 2039),
    "a10": Card("A10", (8, 6), 22.5, 125.0, 31.2, 600),
    "3090": Card("GeForce RTX 3090", (8, 6), 24.0, 71.0, 35.6, 936),
    "4090": Card("GeForce RTX 4090", (8, 9), 24.0, 165.2, 82.6, 1008),
    "l4": Card("L4", (8, 9), 22.5, 121.0, 30.3, 300),
    "l40s": Card("L40S", (8, 9), 45.0, 362.0, 91.6, 864),
    "h100": Card("H100 SXM5 80 GB", (9, 0), 79.6, 989.4, 66.9, 3350),
    "h200": Card("H200 SXM 141 GB", (9, 0), 140.4, 989.4, 66.9, 4800),
    "b200": Card("B200 SXM 180 GB", (10, 0), 179.0, 2250.0, 75.0, 7700),
}


def card_named(name: str) -> Card | None:
    """Find the card that a driver names, such as `NVIDIA H100 80GB HBM3`; None if it is not known.

    Nor is one that bears the name and is slower: for a slot or a laptop.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"pcie", "nvl", "laptop"}:
        return None
    return next((CARDS[key] for key in sorted(CARDS, key=len, reverse=True) if set(key.split("-")) <= words), None)


REACHED = 0.4
"""Of a card's peak, what a training is taken to reach in matrix products; and of its memory's, twice that."""

CONTEXT_GIB = 0.6
"""What CUDA and its libraries take on a card before there is a tensor."""
