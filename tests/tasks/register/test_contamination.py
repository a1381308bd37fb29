"""Evaluation items that stand in the rows that were trained are found, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.core.parquet import write_rows
from tasks.core.records import Message
from tasks.register.contamination import contamination_by_suite
from tasks.render.stage import rendered_schema
from tasks.reports.items import HELD_OUT, Item, prompt_digest
from tasks.tokenization.chat_template import render_chat, render_prompt

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def item(suite: str, prompt: str) -> Item:
    return Item(suite, "t", prompt, prompt, prompt_digest(prompt), "x", "y", 1.0, -1.0, 1)


@pytest.fixture
def rendered(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """Rows to learn from: a chat of two turns, a pair of replies, and rows of other kinds that are not there."""
    (tmp_path / "train").mkdir()
    turns = [Message(*turn) for turn in (("user", "Which animal says moo?"), ("assistant", "The cow."))]
    turns += [Message("user", f"And now: {LONG}?"), Message("assistant", "Fifteen.")]
    chat = render_chat(tokenizer, turns)
    row: dict[str, Any] = {"id": "1", "family": "", "ids": chat.ids, "mask": chat.mask}
    row["prompt_tokens"] = chat.mask.index(True)
    write_rows(tmp_path / "train" / "chat.parquet", [row], rendered_schema("chat"))
    asked = render_prompt(tokenizer, [Message("user", "Name a colour of the sky.")])
    pair = {"id": "2", "family": "", "prompt_ids": asked, "chosen_ids": asked[:2], "rejected_ids": asked[:1]}
    write_rows(tmp_path / "train" / "preference.parquet", [pair], rendered_schema("preference"))
    for kind in ("labelled", "pair"):
        write_rows(tmp_path / "train" / f"{kind}.parquet", [], rendered_schema(kind))
    return tmp_path


def asked(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, [Message("user", text)])))


def test_whole_prompts_are_found_in_rows_of_every_kind(tokenizer: PreTrainedTokenizerBase, rendered: Path) -> None:
    texts = [
        "Which animal says moo?",
        "which  ANIMAL says moo?",
        "Name a colour of the sky.",
        "Which animal says woof?",
    ]
    items = [item(HELD_OUT, asked(tokenizer, text)) for text in texts]
    assert contamination_by_suite(items, rendered, tokenizer, 13) == {HELD_OUT: 0.75}


def test_long_runs_are_found_for_suites_but_not_for_rows_of_the_same_source(
    tokenizer: PreTrainedTokenizerBase, rendered: Path
) -> None:
    prompt = f"Question: {LONG} fifteen and more?\nAnswer:"
    other = "Question: " + LONG.replace("seven", "many") + "?\nAnswer:"
    items = [item(suite, text) for suite in (HELD_OUT, "exam") for text in (prompt, other)]
    assert contamination_by_suite(items, rendered, tokenizer, 13) == {HELD_OUT: 0.0, "exam": 0.5}
    assert contamination_by_suite(items, rendered, tokenizer, 30) == {HELD_OUT: 0.0, "exam": 0.0}
