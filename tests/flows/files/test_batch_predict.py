"""Answers and log-probabilities of a file, against those of one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from flows.files.batch_predict import score_file
from tasks.core.errors import BadData
from tasks.core.records import Message
from tasks.inference.chat import answer, answer_text
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer, render_prompt, render_reply
from tests.conftest import ROOT, temper
from tests.helpers.encoder_decoders import make_base

ASKED = ["Hello", "What is the last word of this question?", "Count: cow, pig", "Hi", "一二三"]


def written(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_every_row_gets_the_reply_that_it_gets_alone(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = written(tmp_path / "in.parquet", number=range(5), prompt=ASKED)
    model = load_model(pico_base).float()
    assert score_file(model, tokenizer, source, tmp_path / "out.parquet", max_tokens=6, batch_size=2) == 5
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["number"] for row in rows] == list(range(5))
    assert list(rows[0]) == ["number", "prompt", "reply", "finish_reason"]
    for row in rows:
        alone = answer(model, tokenizer, [Message("user", row["prompt"])], 6)
        assert (row["reply"], row["finish_reason"] == "stop") == (alone.text, alone.stopped)
    first = (tmp_path / "out.parquet").read_bytes()
    score_file(model, tokenizer, source, tmp_path / "out.parquet", max_tokens=6, batch_size=2)
    assert (tmp_path / "out.parquet").read_bytes() == first


def test_a_target_is_as_likely_as_plain_transformers_says(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    import torch

    turns = [[{"role": "user", "content": text}] for text in ASKED]
    targets = ["pig", None, "a cow", "Hi there", "四"]
    source = written(tmp_path / "in.parquet", messages=turns, target=targets)
    model = load_model(pico_base).float()
    score_file(model, tokenizer, source, tmp_path / "out.parquet", max_tokens=2, batch_size=4)
    for text, target, row in zip(ASKED, targets, pq.read_table(tmp_path / "out.parquet").to_pylist(), strict=True):
        if target is None:
            assert row["target_logp"] is row["target_tokens"] is None
            continue
        prompt = render_prompt(tokenizer, [Message("user", text)])
        reply = render_reply(tokenizer, [Message("user", text)], target)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(reply)[:, None]).sum().item()
        assert row["target_logp"] == pytest.approx(expected, abs=1e-4)
        assert row["target_tokens"] == len(reply)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"messages": [[{"role": "user", "content": "x"}], [{"role": "user", "content": None}]]}, "is no conversation"),
        ({"question": ["x"]}, "has no column to ask"),
        ({"prompt": ["x"], "reply": ["y"]}, "has columns already that would be written"),
        ({"prompt": ["x", ""]}, "its prompt is empty"),
        ({"prompt": ["x", None]}, "its prompt is empty"),
        ({"messages": [[{"role": "user"}]]}, "is no conversation"),
    ],
)
def test_a_file_that_cannot_be_asked_is_refused_and_nothing_is_written(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    source = written(tmp_path / "in.parquet", **columns)
    with pytest.raises(BadData, match=said) as caught:
        score_file(load_model(pico_base), tokenizer, source, tmp_path / "out.parquet", max_tokens=2, batch_size=1)
    assert str(source) in caught.value.where
    if len(next(iter(columns.values()))) == 2:
        assert caught.value.where == f"{source}, row 2"
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_what_is_no_parquet_file_is_refused(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "in.parquet").write_text("prompt\nx\n")
    with pytest.raises(BadData, match="is no Parquet file"):
        score_file(
            load_model(pico_base),
            tokenizer,
            tmp_path / "in.parquet",
            tmp_path / "out.parquet",
            max_tokens=2,
            batch_size=1,
        )


def test_the_command_works_on_plain_folders(pico_base: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.parquet", prompt=ASKED[:2])
    done = temper(
        tmp_path, "score", str(pico_base), "in.parquet", "out.parquet", "--max-tokens", "2", PYTHONPATH=str(ROOT)
    )
    assert "2 rows written" in done.stdout
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 2
    before = (tmp_path / "out.parquet").stat().st_ino
    again = ("score", str(pico_base), "in.parquet", "out.parquet", "--max-tokens", "1")
    assert "exists already" in temper(tmp_path, *again, code=65, PYTHONPATH=str(ROOT)).stderr
    assert (tmp_path / "out.parquet").stat().st_ino == before
    temper(tmp_path, *again, "--overwrite", PYTHONPATH=str(ROOT))
    assert (tmp_path / "out.parquet").stat().st_ino != before
    assert source.is_file()
    refused = temper(tmp_path, "score", "nowhere", "in.parquet", "no.parquet", code=65, PYTHONPATH=str(ROOT))
    assert "there is no such folder" in refused.stderr
    assert not (tmp_path / "no.parquet").exists()


def test_an_encoder_decoder_reads_inputs(tmp_path: Path) -> None:
    import torch

    texts = ["a cow and a pig", "what is that", "a long line about a cow that is no pig"]
    base = make_base(tmp_path / "t5", "t5", texts)
    model, tokenizer = load_model(base).float(), load_tokenizer(base)
    source = written(tmp_path / "in.parquet", input=texts, target=["cow", "that", "pig"])
    score_file(model, tokenizer, source, tmp_path / "out.parquet", max_tokens=4, batch_size=2)
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        assert row["reply"] == answer_text(model, tokenizer, row["input"], 4).text
        ids, labels = (torch.tensor([tokenizer(row[name])["input_ids"]]) for name in ("input", "target"))
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item()
        assert row["target_logp"] == pytest.approx(-loss * labels.shape[1], abs=1e-3)
