"""How rows become token ids, loss masks and the split."""

from __future__ import annotations

from typing import Literal

from tasks.core.params import Count, Section, Share


class Render(Section):
    """From rows to token ids, loss masks and the split."""

    held_out: Share
    """The share of groups that is kept for evaluation; which ones is a fixed function of their names."""
    max_tokens: Count
    """Tokens in a rendered row."""
    too_long: Literal["truncate", "drop", "refuse"]
    """What becomes of a longer one: cut at the end, left out, or the stage fails; all are counted."""
    loss_on: Literal["all", "last"]
    """Which of the assistant's turns are learnt: all, or only the last. Templates that rewrite earlier turns, such as
    Qwen3's, need `last`."""
