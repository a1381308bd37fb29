"""Rows: reading them from files, and rendering them to token ids and loss masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper._methods import checked

if TYPE_CHECKING:
    from tasks.core.records import Record
    from temper._models import Base


def read_rows(path: str | Path, *, max_refused: float = 0.0) -> list[Record]:
    """Read the rows of one file, of any form that is known, told by its content.

    Args:
        path: json, jsonl, csv, tsv, parquet, arrow or txt, also in gz, zst or zip.
        max_refused: up to this share of malformed rows is left out.

    Raises:
        BadData: the file is missing, empty or damaged, or a larger share of it is malformed.
    """
    from flows.files.inspect import any_file
    from tasks.ingest.stage import Reading

    return list(Reading(Path(path).stem, any_file(Path(path), max_refused)).records())


@dataclass(frozen=True)
class Data:
    """Rendered rows, by the side of the split and by kind (chat, preference, labelled, pair).

    Attributes:
        train: the rows to train on, as lists of columns that docs of the stage `render` name: ids, mask, ....
        held_out: the rows that the loss is measured on.
        truncated: rows that were cut to `max_tokens`.
        dropped: rows that were left out, being longer.
    """

    train: Mapping[str, Sequence[Mapping[str, Any]]]
    held_out: Mapping[str, Sequence[Mapping[str, Any]]]
    truncated: int
    dropped: int


def render(
    rows: Sequence[Record],
    base: Base,
    *,
    held_out: float = 0.1,
    max_tokens: int = 192,
    too_long: Literal["truncate", "drop", "refuse"] = "refuse",
    loss_on: Literal["all", "last"] = "all",
    reasoning: Literal["keep", "drop", "last_turn_only"] = "keep",
) -> Data:
    """Render rows to token ids and loss masks with a model's tokenizer and chat template, and split them.

    Args:
        rows: what `read_rows` gave.
        base: the model that is to be trained.
        held_out: the share of groups that is kept for evaluation, a fixed function of their prompts.
        max_tokens: tokens in a rendered row, at most.
        too_long: what becomes of a longer one.
        loss_on: which of the assistant's turns the loss falls on.
        reasoning: what becomes of the assistant's: kept, left out, or kept in the last turn alone.

    Raises:
        BadData: rows that have no token to train on, that the template does not fit, or that the model cannot learn.
        BadParams: an option is wrong.
    """
    from tasks.render.params import Render
    from tasks.render.stage import RENDERED, check_kinds, render_rows
    from tasks.tokenization.architecture import architecture_in

    lengths = {"held_out": held_out, "max_tokens": max_tokens, "too_long": too_long}
    params = checked(Render, {**lengths, "loss_on": loss_on, "reasoning": reasoning}, "temper.render")
    records = [row for row in rows if row.kind in RENDERED]
    check_kinds(rows, architecture_in(base.folder))
    rendered, counts = render_rows(records, base.tokenizer, params)
    by_split = {split: {k: found for (s, k), found in rendered.items() if s == split} for split, _ in rendered}
    return Data(by_split["train"], by_split["held_out"], counts["truncated"], counts["dropped"])
