"""A first params.yaml for one's own rows: what it says of them, and that the stages take it as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flows.run.init_params import init_params
from tasks.core.errors import BadData
from tasks.orchestration.params import load_params
from tests.conftest import run_all_stages

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus 2?"}, {"role": "assistant", "content": f"{n + 2}"}]}
    for n in range(60)
]
PAIRS = [{"prompt": f"What is {n} plus 2?", "chosen": str(n + 2), "rejected": "no"} for n in range(40)]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "methods"),
    [(CHATS, {"qlora": "sft"}), (PAIRS, {"orpo": "orpo"}), ([*CHATS, *PAIRS], {"qlora": "sft", "orpo": "orpo"})],
)
def test_methods_suit_the_kinds_of_rows(workspace: Path, rows: list[dict[str, Any]], methods: dict[str, str]) -> None:
    text = init_params(workspace, written(workspace, "my rows.jsonl", rows), workspace / "models" / "tiny")
    params = load_params(workspace / "params.yaml")
    assert {name: method.objective.name for name, method in params.train.items()} == methods
    assert params.ingest.sources["my-rows"].path == "my rows.jsonl"
    assert params.promote.metric == "score"  # replies of a word
    assert "#" in text


def test_max_tokens_holds_the_longest_row_and_no_more_than_the_model_reads(workspace: Path) -> None:
    base = workspace / "models" / "tiny"
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    init_params(workspace, written(workspace, "rows.jsonl", CHATS), base)
    longest = max(len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) for row in CHATS)
    assert longest <= load_params(workspace / "params.yaml").render.max_tokens < longest + 64
    long = [{"messages": [CHATS[0]["messages"][0], {"role": "assistant", "content": "plus two " * 500}]}]
    init_params(workspace, written(workspace, "rows.jsonl", long), base)
    context = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    params = load_params(workspace / "params.yaml")
    assert params.render.max_tokens + params.evaluate.max_new_tokens == context  # a prompt as long can be answered


def test_malformed_rows_are_counted_and_let_through(workspace: Path) -> None:
    rows: list[dict[str, Any]] = [*CHATS, {"messages": []}]
    text = init_params(workspace, written(workspace, "rows.jsonl", rows), workspace / "models" / "tiny")
    source: Any = load_params(workspace / "params.yaml").ingest.sources["rows"]
    assert source.max_refused == 0.017  # 1 of 61, rounded up
    assert "1 rows are malformed" in text


def test_texts_are_refused_with_where_to_begin(workspace: Path) -> None:
    before = (workspace / "params.yaml").read_bytes()
    path = written(workspace, "texts.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(BadData, match="scratch-llama"):
        init_params(workspace, path, workspace / "models" / "tiny")
    assert (workspace / "params.yaml").read_bytes() == before


def test_the_stages_run_on_it_without_an_edit(workspace: Path) -> None:
    init_params(workspace, written(workspace, "rows.jsonl", CHATS), workspace / "models" / "tiny")
    run_all_stages(workspace)
    assert (workspace / "data" / "reports" / "qlora" / "registered.json").is_file()
