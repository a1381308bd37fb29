"""What every training in params says the same way: the schedule of its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tasks.core.params import Section


class WarmupStableDecay(Section):
    """The peak until the last steps, and from there to zero (arXiv:2405.18392)."""

    wsd: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The share of all steps in which the rate goes down, by 1 - sqrt; 0.2 in section 3 of the paper."""


Schedule: TypeAlias = Literal["constant", "linear", "cosine"] | WarmupStableDecay
