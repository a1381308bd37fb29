"""The rows that a method learns from, and in which steps.

Every epoch is a new shuffle, a fixed function of the seed: a training that goes on sees what it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.artifacts import read_manifest
from tasks.core.errors import BadData, BadParams
from tasks.inference.rendered_rows import RenderedRows, row_of
from tasks.inference.rows import TokenRow
from tasks.tokenization.architecture import ENCODER_DECODER, Architecture
from tasks.train.examples import Example
from tasks.train.params import AnyObjective, KtoObjective, Method, SftObjective


def kind_of_rows(objective: AnyObjective, architecture: Architecture) -> str:
    """Return the kind of rows that an objective learns from: for SFT what the base answers, else pairs or labels.

    Raises:
        BadParams: the objective is not for this kind of model.
    """
    if isinstance(objective, SftObjective):
        return architecture.rows
    if architecture is ENCODER_DECODER:
        raise BadParams(
            "preferences are for decoders only",
            where="train.*.objective",
            got=f"{objective.name} on an {architecture.name} base",
            expected="sft, which learns inputs and their targets",
        )
    return "labelled" if isinstance(objective, KtoObjective) else "preference"


def read_examples(
    rendered: Path, split: str, objective: AnyObjective, architecture: Architecture
) -> RenderedRows[Example]:
    """Read the rows that an objective learns from, on a base of this kind; an example is made when it is asked for.

    Raises:
        BadData: there is none, or KTO has nothing to tell apart.
        BadParams: the objective is not for this kind of model.
    """
    kind = kind_of_rows(objective, architecture)
    path = rendered / split / f"{kind}.parquet"
    rows = RenderedRows.read(path, _EXAMPLES[kind])
    labels = set(rows.column("label")) if kind == "labelled" and split == "train" else ()
    _check_rows(len(rows), labels, kind, objective, architecture, str(path))
    return rows


def examples_of(
    rows: Sequence[Mapping[str, Any]],
    objective: AnyObjective,
    architecture: Architecture,
    where: str,
    *,
    of_both: bool = True,
) -> list[Example]:
    """Make examples of rendered rows of the kind that an objective learns from; `of_both`: KTO needs both labels.

    Raises:
        BadData: there is none, or KTO has nothing to tell apart.
        BadParams: the objective is not for this kind of model.
    """
    kind = kind_of_rows(objective, architecture)
    labels = {row["label"] for row in rows} if kind == "labelled" and of_both else ()
    _check_rows(len(rows), labels, kind, objective, architecture, where)
    return [_EXAMPLES[kind](row) for row in rows]


def _check_rows(
    count: int, labels: Collection[bool], kind: str, objective: AnyObjective, architecture: Architecture, where: str
) -> None:
    if not count:
        raise BadData(
            f"holds no {kind} rows, which the objective {objective.name} learns from",
            where=where,
            got=f"a base that is of the kind {architecture.name}",
            fix="add a source with such rows, or remove the method from `train`",
        )
    if len(labels) == 1:
        raise BadData(
            "holds replies of one label only, so there is nothing to tell apart",
            where=where,
            got=f"{count} replies that are all {'good' if True in labels else 'bad'}",
            expected="good and bad ones",
            fix="add a source with the others, or learn good replies by the objective sft",
        )


def data_digests(rendered: Path, kind: str) -> dict[str, str]:
    """Return the SHA-256 of the files that a training reads, by their paths, after checking all of the folder."""
    files = read_manifest(rendered)["files"]
    names = [f"{split}/{kind}.parquet" for split in ("train", "held_out")]
    return {name: files[name]["sha256"] for name in names if name in files}


def _joined(prompt: list[int], reply: list[int], *, desirable: bool = True) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt), desirable)


def _scored(row: Mapping[str, Any]) -> Example:
    return (row_of(row),)


def _preferred(row: Mapping[str, Any]) -> Example:
    return tuple(_joined(row["prompt_ids"], row[reply]) for reply in ("chosen_ids", "rejected_ids"))


def _labelled(row: Mapping[str, Any]) -> Example:
    return (_joined(row["prompt_ids"], row["reply_ids"], desirable=row["label"]),)


_EXAMPLES: Mapping[str, Callable[[Mapping[str, Any]], Example]] = {
    "chat": _scored,
    "pair": _scored,
    "preference": _preferred,
    "labelled": _labelled,
}
"""What an example is made of, by the kind of rows."""


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Count the tokens of each example, over all its sequences; of rows in buffers without making any."""
    if not isinstance(examples, RenderedRows):
        return [sum(sequence.tokens for sequence in example) for example in examples]
    columns = examples.lengths()
    if "chosen_ids" in columns:  # the prompt stands before both replies
        columns["prompt_ids"] = [2 * tokens for tokens in columns["prompt_ids"]]
    return [sum(tokens) for tokens in zip(*columns.values(), strict=True)]


def shapes_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Return the tokens of each sequence that a decoder reads, and how many of them are the prompt's."""
    sequences = (sequence for example in examples for sequence in example if isinstance(sequence, TokenRow))
    return [(sequence.tokens, sequence.prompt_tokens) for sequence in sequences]


def all_batches(lengths: Sequence[int], method: Method) -> list[list[int]]:
    """Return the rows of every step: fixed by the method, so that a resumed training sees what it would have seen."""
    epochs = (batches_of(epoch, lengths, method.batch_size, method.seed) for epoch in range(method.epochs))
    return [rows for epoch in epochs for rows in epoch]


def batches_of(epoch: int, lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Return the rows of an epoch's steps.

    Every epoch is a new shuffle; within runs of sixteen batches rows are grouped by length, so that little is padding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 16 * batch_size
    grouped = [
        i
        for start in range(0, len(order), window)
        for i in sorted(order[start : start + window], key=lengths.__getitem__)
    ]
    places = torch.randperm(steps_per_epoch(len(lengths), batch_size), generator=generator).tolist()
    return [grouped[which * batch_size : (which + 1) * batch_size] for which in places]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of batches that cover all rows once."""
    return math.ceil(rows / batch_size)
