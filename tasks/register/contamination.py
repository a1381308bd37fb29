"""Evaluation items that stand in the training rows, by their words (see tasks/text/ngram_overlap.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.parquet import read_table
from tasks.inference.rendered_rows import last_turn
from tasks.reports.items import HELD_OUT, Item
from tasks.text.ngram_overlap import Index
from tasks.text.words import Words, hashes_of, normal_form, runs, words_of

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 4096
"""Rows that are decoded together."""


def contamination_by_suite(
    items: Sequence[Item], rendered: Path, tokenizer: PreTrainedTokenizerBase, run_words: int
) -> dict[str, float]:
    """Compute for each suite the share of items whose prompt stands in the rows to learn from.

    A prompt stands there when a row's prompt is equal to it in the form that the split groups by, or a row has a run of
    `run_words` words of it that is in no more than ten prompts. The held-out rows are only looked for whole: rows of
    one source share phrases, and what else they share `validate` has looked for.

    Args:
        items: of all suites.
        rendered: the output of `render`.
        tokenizer: which rendered it.
        run_words: `validate.contamination_ngram`.
    """
    import numpy as np

    suites: dict[str, list[str]] = {}
    for item in items:
        suites.setdefault(item.suite, []).append(item.prompt)
    indexes = {
        suite: Index(_array(prompts), None if suite == HELD_OUT else run_words) for suite, prompts in suites.items()
    }
    found: dict[str, set[int]] = {suite: set() for suite in suites}
    for prompts, texts in _training_texts(rendered, tokenizer):
        hashes = hashes_of(_array(prompts))
        filled = np.flatnonzero(hashes)
        inside = runs(words_of(normal_form(_array(texts))), run_words)
        for suite, index in indexes.items():
            searched = Words(np.empty(0, np.uint64), np.empty(0, np.int64)) if suite == HELD_OUT else inside
            found[suite].update(index.search(Words(hashes[filled], filled), searched).question.tolist())
    return {suite: len(found[suite]) / len(prompts) for suite, prompts in suites.items()}


def _array(texts: Sequence[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(texts, pa.large_string())


def _training_texts(rendered: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the prompts and the whole texts of the rows to train on, some at a time."""
    for file in sorted((rendered / "train").glob("*.parquet")):
        table = read_table(file)
        for start in range(0, len(table), _AT_ONCE):
            asked, told = _tokens(table.slice(start, _AT_ONCE).to_pylist())
            yield [str(tokenizer.decode(ids)) for ids in asked], [str(tokenizer.decode(ids)) for ids in told]


def _tokens(rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of the prompts of rows of one kind, and of their whole texts."""
    if "ids" in rows[0]:
        asked = [row["ids"][:count] for row in rows for count in {row["prompt_tokens"], last_turn(row)}]
        return asked, [row["ids"] for row in rows]
    if "input_ids" in rows[0]:
        return [row["input_ids"] for row in rows], [
            ids for row in rows for ids in (row["input_ids"], row["target_ids"])
        ]
    replies = [name for name in ("chosen_ids", "rejected_ids", "reply_ids") if name in rows[0]]
    return [row["prompt_ids"] for row in rows], [row["prompt_ids"] + row[name] for row in rows for name in replies]
