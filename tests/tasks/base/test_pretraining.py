"""Pretraining on a real corpus: what is trained, what is held out, what is said of it, and where it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.base.corpus import own_token_ids, read_corpus, text_bytes
from tasks.base.perplexity import perplexity
from tasks.base.pretraining import document, make_model
from tasks.core.errors import BadData, BadModel
from tasks.core.parquet import write_records
from tasks.core.progress import Progress
from tasks.core.records import ChatExample, Message, Record, TextExample, held_out
from tasks.ingest.stage import Reading
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer
from tasks.tokenization.tokenizer import read_tokenizer
from tests.helpers.samples import file_source, pretrain_params

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "looked",
    "at",
    "one",
    "of",
    "many",
    "birds",
    "that",
    "sang",
    "in",
    "trees",
]


def texts(count: int, changed: str = "") -> list[Record]:
    """Texts of which each is a group of its own; those that are held out end in what is given."""
    rows: list[Record] = []
    for n in range(count):
        text = " ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 14))
        group = f"group {n}"
        tail = changed if held_out(group, 0.1) else ""
        rows.append(TextExample(id=str(n), source="s", text=f"{text} {n}{tail}", group=group))
    return rows


def chats(count: int) -> list[Record]:
    return [
        ChatExample(id=f"c{n}", source="s", messages=(Message("user", f"say {n}"), Message("assistant", f"it is {n}")))
        for n in range(count)
    ]


def clean(folder: Path, rows: list[Record]) -> str:
    folder.mkdir()
    write_records(folder, rows)
    return str(folder)


def made(folder: Path, path: str, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    return make_model(pretrain_params(path=path, **changes), folder, folder.with_suffix(".checkpoints"))


def test_held_out_rows_never_enter_the_blocks(tmp_path: Path) -> None:
    """Whatever they say, tokenizer and weights come out the same; only their perplexity differs."""
    one = made(tmp_path / "one", clean(tmp_path / "clean one", texts(200)), held_out_rows=100)
    two = made(tmp_path / "two", clean(tmp_path / "clean two", texts(200, " quite another end")), held_out_rows=100)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one["held_out"]["rows"] == two["held_out"]["rows"] == sum(held_out(f"group {n}", 0.1) for n in range(200))
    assert one["held_out"]["loss"] < two["held_out"]["loss"]


def test_a_corpus_is_split_as_render_splits_and_keeps_at_most_so_many_rows(tmp_path: Path) -> None:
    path = clean(tmp_path / "clean", [*texts(100), *chats(100)])
    corpus = read_corpus(pretrain_params(path=path, held_out_rows=7))
    assert len(corpus.held_out) == 7
    assert all(held_out(row.split_group(), 0.1) for row in corpus.held_out)
    assert not any(held_out(row.split_group(), 0.1) for row in corpus.train)
    only = read_corpus(pretrain_params(path=path, rows=["chat"], held_out=0.0))
    assert (len(only.train), len(only.held_out)) == (100, 0)
    assert {type(row) for row in only.train} == {ChatExample}


def test_what_is_said_of_held_out_rows_is_so(tmp_path: Path) -> None:
    """The figures, in the manifest, log and card, are those of the published model, measured anew."""
    path = clean(tmp_path / "clean", texts(200))
    said = made(tmp_path / "out", path, tokens=128 * 30)["held_out"]
    corpus = read_corpus(pretrain_params(path=path))
    tokenizer = load_tokenizer(tmp_path / "out")
    rows = [tokenizer(document(row), add_special_tokens=False)["input_ids"] for row in corpus.held_out]
    model = load_model(tmp_path / "out", full_precision=True)
    found = perplexity(model, rows, text_bytes(corpus.held_out), context_tokens=32, batch_tokens=64)
    assert found is not None
    assert said["tokens"] == sum(len(row) - 1 for row in rows)
    assert said["loss"] == pytest.approx(found.loss, rel=1e-3)
    assert said["perplexity"] < 200  # of 400 for one that knows nothing
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 31
    assert log[-1] == {"held_out": said}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"held-out text | {said['loss']:.4f} nats per token, perplexity {said['perplexity']:.3f}" in card
    assert f"over {said['tokens']:,} tokens of {said['rows']} rows" in card


def test_without_held_out_rows_nothing_is_said_of_them(tmp_path: Path) -> None:
    assert made(tmp_path / "out", clean(tmp_path / "clean", texts(100)), held_out=0.0) == {}
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text()


def test_kinds_that_are_not_asked_for_are_not_trained(tmp_path: Path) -> None:
    with_chats = clean(tmp_path / "with", [*texts(100), *chats(100)])
    made(tmp_path / "one", with_chats, rows=["text"])
    made(tmp_path / "two", clean(tmp_path / "without", texts(100)), rows=["text", "chat"])
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (chats(9), {"rows": ["text"]}, "no rows to pretrain on"),
        (texts(9), {"held_out": 1.0}, "9 held-out rows and no others"),
        ([TextExample(id="1", source="s", text="short")], {"held_out": 0.0}, "too little text"),
    ],
)
def test_a_corpus_to_learn_nothing_from_is_refused(
    tmp_path: Path, rows: list[Record], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadData) as caught:
        made(tmp_path / "out", clean(tmp_path / "clean", rows), **changes)
    assert said in str(caught.value)


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(steps))

    def step(self: Progress, note: str = "") -> None:
        if next(left, None) is None:
            raise Killed

    monkeypatch.setattr(Progress, "step", step)


def test_killed_and_run_again_it_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clean(tmp_path / "clean", texts(200))
    made(tmp_path / "whole", path)
    with monkeypatch.context() as patch:
        kill_after(3, patch)
        with pytest.raises(Killed):
            made(tmp_path / "again", path)
    (tmp_path / "again").rename(tmp_path / "first try")
    made(tmp_path / "again", path)
    for name in ("model.safetensors", "README.md", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_step_in_parts_has_the_loss_and_the_gradient_of_the_whole_step(tmp_path: Path) -> None:
    path = clean(tmp_path / "clean", texts(200))
    for blocks in (1, 3, 4):  # of 4 in a step
        made(tmp_path / f"{blocks}", path, micro_batch_size=blocks)
    logs = [
        [json.loads(line) for line in (tmp_path / f"{blocks}" / "log.jsonl").read_text().splitlines()][:-1]
        for blocks in (1, 3, 4)
    ]
    for rows in zip(*logs, strict=True):
        for figure in ("loss", "grad_norm"):
            assert [row[figure] for row in rows[:2]] == pytest.approx([rows[2][figure]] * 2, rel=1e-3)
    with pytest.raises(ValueError, match="micro_batch_size must be at most"):
        pretrain_params(micro_batch_size=5)


def test_a_small_llama_learns_from_real_stories(tmp_path: Path, real_data: Path) -> None:
    source = file_source(real_data / "tinystories_2mib" / "tinystories_sample.txt", format="text")
    rows = list(Reading("s", source).records())[:300]
    sizes = {"context_tokens": 64, "batch_tokens": 512, "tokens": 512 * 60, "checkpoint_every_steps": 100}
    said = made(tmp_path / "out", clean(tmp_path / "clean", rows), rows=["text"], held_out_rows=100, **sizes)
    assert said["held_out"]["rows"] == sum(held_out(row.split_group(), 0.1) for row in rows)
    assert said["held_out"]["perplexity"] < 100  # of 400


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is not the folder of clean rows"):
        made(tmp_path / "out", str(tmp_path))


def test_documents_of_an_existing_model_are_what_its_tokenizer_makes_of_them(real_data: Path, pico_base: Path) -> None:
    llama = read_tokenizer(real_data / "stories260k" / "hf")
    row = TextExample(id="1", source="s", text="Once upon a time")
    (ids,) = own_token_ids(llama, [row])
    assert (ids[0], ids[-1]) == (llama.bos_token_id, llama.eos_token_id)
    assert llama.decode(ids[1:-1]) == "Once upon a time"
    chat = chats(1)[0]
    assert isinstance(chat, ChatExample)
    with pytest.raises(BadModel, match="no chat template, and chats are to be trained on"):
        list(own_token_ids(llama, [row, chat]))
    pico = load_tokenizer(pico_base)
    talk, text = own_token_ids(pico, [chat, row])
    assert pico.decode(text) == "Once upon a time<|im_end|>"
    assert pico.decode(talk) == "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\nit is 0<|im_end|>"
    unanswered = ChatExample(id="x", source="s", messages=(Message("user", "a"),))
    with pytest.raises(BadData, match="1 chats cannot be rendered"):
        list(own_token_ids(pico, [unanswered]))
