"""Rendered rows in buffers: what they give, and what a token takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.parquet import write_rows
from tasks.inference.rendered_rows import ListColumn, RenderedRows, read_questions
from tasks.render.stage import rendered_schema
from tasks.tokenization.architecture import DECODER, ENCODER_DECODER, Architecture
from tasks.train.batching import lengths_of, read_examples
from tasks.train.params import Method
from tests.helpers.samples import DPO, KTO, LORA, SFT, method

TOKENS, REPLY = 200, 40
KINDS: dict[str, tuple[Method, Architecture, dict[str, Any]]] = {
    "chat": (method(LORA, SFT), DECODER, {"ids": [5] * TOKENS, "mask": [True] * TOKENS, "prompt_tokens": 9}),
    "preference": (
        method(LORA, DPO),
        DECODER,
        {"prompt_ids": [5] * TOKENS, "chosen_ids": [6] * REPLY, "rejected_ids": [7] * REPLY},
    ),
    "labelled": (method(LORA, KTO), DECODER, {"prompt_ids": [5] * TOKENS, "reply_ids": [6] * REPLY}),
    "pair": (method(LORA, SFT), ENCODER_DECODER, {"input_ids": [5] * TOKENS, "target_ids": [6] * REPLY}),
}
"""Of each kind of rows: who learns from them, and one."""


def rendered(folder: Path, kind: str, row: dict[str, Any], count: int) -> int:
    """Writes so many rows to learn from; returns the tokens that lie in their columns."""
    rows = [{"id": str(n), "family": "f", **row} | ({"label": n % 2 == 0} if kind == "labelled" else {})
            for n in range(count)]  # fmt: skip
    (folder / "train").mkdir(exist_ok=True)
    write_rows(folder / "train" / f"{kind}.parquet", rows, rendered_schema(kind))
    return count * sum(len(ids) for name, ids in row.items() if name.endswith("ids"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_the_rows_takes_five_bytes_until_a_step_needs_it(kind: str, tmp_path: Path) -> None:
    params, architecture, row = KINDS[kind]
    tokens = rendered(tmp_path, kind, row, 2000)
    read_examples(tmp_path, "train", params.objective, architecture)  # what imports take
    tracemalloc.start()
    examples = read_examples(tmp_path, "train", params.objective, architecture)
    assert len(lengths_of(examples)) == 2000
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    columns = [column for column in examples._columns.values() if isinstance(column, ListColumn)]
    held += sum(column.values.nbytes for column in columns if column.values.dtype == np.int32)  # Arrow's, not traced
    strings = 2000 * 250  # id, family, label, bounds
    assert held <= 5 * tokens + strings


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_examples(kind: str, tmp_path: Path) -> None:
    params, architecture, row = KINDS[kind]
    rendered(tmp_path, kind, row, 6)
    examples = read_examples(tmp_path, "train", params.objective, architecture)[1:5]
    assert len(examples) == 4
    assert lengths_of(examples) == lengths_of(list(examples))


def test_rows_are_those_of_the_file_in_however_many_pieces_it_is_read(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "family": "f", "ids": list(range(n)), "mask": [i % 3 == 0 for i in range(n)], "prompt_tokens": n}
        for n in range(7)
    ]
    table = pa.Table.from_pylist(rows, schema=rendered_schema("chat"))
    pq.write_table(table, tmp_path / "groups.parquet", row_group_size=2)
    read = RenderedRows.read(tmp_path / "groups.parquet", dict)
    assert list(read) == rows == pq.read_table(tmp_path / "groups.parquet").to_pylist()
    assert list(read[5:1:-2]) == rows[5:1:-2]
    assert read[-1] == rows[-1]
    with pytest.raises(IndexError):
        read[7]


def test_of_no_rows_there_are_none(tmp_path: Path) -> None:
    write_rows(tmp_path / "none.parquet", [], rendered_schema("chat"))
    assert list(RenderedRows.read(tmp_path / "none.parquet", dict)) == []


def test_where_there_are_no_chats_chosen_replies_are_asked(tmp_path: Path) -> None:
    (tmp_path / "held_out").mkdir()
    pair = {"id": "a", "family": "f", "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    write_rows(tmp_path / "held_out" / "chat.parquet", [], rendered_schema("chat"))
    write_rows(tmp_path / "held_out" / "preference.parquet", [pair], rendered_schema("preference"))
    assert list(read_questions(tmp_path, DECODER)) == [
        {"id": "a", "family": "f", "ids": [1, 2, 3], "mask": [False, False, True], "prompt_tokens": 2}
    ]
