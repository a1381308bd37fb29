"""Rendered rows scored by whichever kind of model they are for: chats by decoders, pairs by encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tasks.core.errors import BadData
from tasks.core.parquet import read_rows
from tasks.inference.encoder_decoder import PairRow, score_pairs
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import Scored, TokenRow
from tasks.models.loader import Model
from tasks.tokenization.architecture import DECODER, Architecture

if TYPE_CHECKING:
    from tasks.inference.frozen_layer_cache import FrozenLayerCache


Row: TypeAlias = "TokenRow | PairRow"
"""What a model is scored on."""


def row_of(rendered: Mapping[str, Any]) -> Row:
    """Build the row that a model is scored on from one of chat.parquet or pair.parquet, detected by its columns."""
    if "target_ids" in rendered:
        return PairRow(rendered["input_ids"], rendered["target_ids"])
    return TokenRow(rendered["ids"], rendered["mask"], rendered["prompt_tokens"])


def read_questions(rendered: Path, architecture: Architecture) -> list[dict[str, Any]]:
    """Held-out rows to answer: chats of a decoder, or where there are none, pairs' prompts with their chosen replies.

    Raises:
        BadData: there are no such rows.
    """
    folder = rendered / "held_out"
    rows = read_rows(folder / f"{architecture.rows}.parquet")
    if not rows and architecture is DECODER:
        rows = [
            {
                "id": row["id"],
                "family": row["family"],
                "ids": row["prompt_ids"] + row["chosen_ids"],
                "mask": [False] * len(row["prompt_ids"]) + [True] * len(row["chosen_ids"]),
                "prompt_tokens": len(row["prompt_ids"]),
            }
            for row in read_rows(folder / "preference.parquet")
        ]
    if not rows:
        raise BadData(
            f"holds no {architecture.rows} rows to evaluate on, which a model of the kind {architecture.name} answers",
            where=str(folder),
            fix="raise render.held_out",
        )
    return rows


def score_rows(
    model: Model, rows: Sequence[Row], below: FrozenLayerCache | None = None, *, with_mean: bool = False
) -> Scored:
    """Score the log-probability of every scored token of some rows, which are all of one kind.

    `below` keeps what a decoder's adapter cannot change; `with_mean` also gives the mean over the vocabulary.
    """
    if pairs := [row for row in rows if isinstance(row, PairRow)]:
        return score_pairs(model, pairs, with_mean=with_mean)
    return score_tokens(model, [row for row in rows if isinstance(row, TokenRow)], below, with_mean=with_mean)


def last_turn(row: Mapping[str, Any]) -> int:
    """Return where the last scored turn of a rendered chat begins: what stands before is the prompt."""
    mask: list[bool] = row["mask"]
    start = len(mask) - 1 - mask[::-1].index(True)
    while start > 0 and mask[start - 1]:
        start -= 1
    return start
