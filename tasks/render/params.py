"""Params of rendering: token ids, loss masks and the split."""

from __future__ import annotations

from typing import Literal

from tasks.core.params import Count, HeldOut


class Render(HeldOut):
    """From rows to token ids, loss masks and the split."""

    max_tokens: Count = 1024
    """Tokens in a rendered row."""
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"
    """What becomes of a longer one: cut at the end, left out, or the stage fails; all are counted."""
    loss_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained on: all, or only the last. Templates that rewrite earlier turns, such
    as Qwen3's, need `last`."""
    reasoning: Literal["keep", "drop", "last_turn_only"] = "keep"
    """What becomes of the assistant's reasoning: kept, left out, or kept in the last turn alone, as served models see a
    conversation. Templates that read it get it as a field of its own; for others it stands before the text."""
