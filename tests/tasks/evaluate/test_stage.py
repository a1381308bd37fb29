from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData, BadModel
from tasks.core.layout import EXAMPLES
from tasks.core.parquet import write_rows, write_table
from tasks.core.records import Message
from tasks.evaluate.forgetting import general_loss
from tasks.evaluate.held_out import answer_rows, token_logps
from tasks.evaluate.metrics import metrics_of
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.params import Evaluate
from tasks.evaluate.stage import evaluate_model
from tasks.evaluate.suite_params import GeneralText
from tasks.inference.chat import answer
from tasks.inference.params import GREEDY
from tasks.inference.rendered_rows import last_turn
from tasks.models.loader import load_model
from tasks.reports.items import Item, mean_loss, prompt_digest, read_items
from tasks.reports.statistics import bootstrap
from tasks.tokenization.chat_template import render_chat, template_digest
from tests.helpers.samples import CHOICE, EVALUATE, MULTIPLE, rows_suite, write_lines

QUESTIONS = [
    ("What is 1 plus 2?", "3"),
    ("狗?", "dog"),
    ("Count the animals: cat, dog", "2"),
    ("Hello", "Hello, how are you?"),
]


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    made = []
    for n, (question, reply) in enumerate(QUESTIONS):
        ids, mask, prompt_tokens = render_chat(tokenizer, [Message("user", question), Message("assistant", reply)])
        made.append({"id": str(n), "family": f"f{n % 2}", "ids": ids, "mask": mask, "prompt_tokens": prompt_tokens})
    return made


def test_answers_are_those_that_serving_gives(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    """lm-eval in padded batches against one conversation at a time through the chat path."""
    model = load_model(pico_base)
    found = answer_rows(model, tokenizer, rows, EVALUATE)
    for one, (question, reply) in zip(found, QUESTIONS, strict=True):
        served = answer(model, tokenizer, [Message("user", question)], EVALUATE.max_new_tokens)
        assert one.prediction == served.text
        assert one.target == reply
        assert one.score == float(one.prediction == reply)
        assert question in one.prompt


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_drawn_answers_are_those_that_serving_gives_in_any_batch(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], batch_size: int
) -> None:
    """lm-eval sorts rows by length and pads them; a row's draws depend on the seed and its prompt alone."""
    model = load_model(pico_base).float()
    options = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "repetition_range": 4, "seed": 5}
    generation = GREEDY.model_copy(update=options)
    params = EVALUATE.model_copy(update={"batch_size": batch_size, "max_new_tokens": 12, "generation": generation})
    found = [each.prediction for each in answer_rows(model, tokenizer, rows, params)]
    served = [answer(model, tokenizer, [Message("user", q)], 12, generation).text for q, _ in QUESTIONS]
    assert found == served
    assert found != [answer(model, tokenizer, [Message("user", q)], 12).text for q, _ in QUESTIONS]


@pytest.mark.parametrize(
    "own", [{"sequence_bias": [[[5], 50.0]]}, {"max_time": 1e-6}, {"max_new_tokens": 1}, {"eos_token_id": [5, 6, 7]}]
)
def test_the_models_own_generation_config_changes_no_answer(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], own: dict[str, Any]
) -> None:
    params = EVALUATE.model_copy(update={"max_new_tokens": 12})
    model: Any = load_model(pico_base)
    plain = answer_rows(model, tokenizer, rows, params)
    model.generation_config = GenerationConfig(**own)
    assert answer_rows(model, tokenizer, rows, params) == plain


def test_a_model_that_counts_no_positions_has_no_limit(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    """Bloom; lm-eval would cut what is beyond 2048 tokens."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    model: Any = BloomForCausalLM(config).eval()
    ids, mask, prompt_tokens = render_chat(tokenizer, [Message("user", "cat " * 2500), Message("assistant", "cat")])
    long = {"id": "long", "family": "f", "ids": ids, "mask": mask, "prompt_tokens": prompt_tokens}
    found = answer_rows(model, tokenizer, [*rows, long], EVALUATE)
    assert [one.id for one in found] == ["0", "1", "2", "3", "long"]
    assert prompt_tokens > 2048
    assert found[-1].prediction == answer(model, tokenizer, [Message("user", "cat " * 2500)], 3).text


def test_a_limit_may_stand_in_the_config_of_the_text_model(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 12}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model: Any = Gemma3ForConditionalGeneration(Gemma3Config(text_config=shape, vision_config=vision)).eval()
    with pytest.raises(BadData, match="prompts of at most 9 tokens"):
        answer_rows(model, tokenizer, rows, EVALUATE)


def test_losses_are_those_of_the_model_on_its_own_labels(pico_base: Path, rows: list[dict[str, Any]]) -> None:
    """Against the loss that transformers computes, one row at a time."""
    model = load_model(pico_base).float()
    for row, logp in zip(rows, token_logps(model, rows, 3), strict=True):
        ids = torch.tensor([row["ids"]])
        labels = torch.where(torch.tensor([row["mask"]]), ids, -100)
        expected = -model(input_ids=ids, labels=labels).loss.item() * sum(row["mask"])
        assert logp == pytest.approx(expected, rel=1e-4)


def test_the_last_turn_is_what_is_answered(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    ids, mask, _ = render_chat(tokenizer, turns)
    start = last_turn({"mask": mask})
    assert str(tokenizer.decode(ids[start:])) == "d<|im_end|>"
    assert last_turn({"mask": [False, True, True]}) == 1
    assert last_turn({"mask": [True]}) == 0


def test_the_model_answers_the_tokens_that_training_saw(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    """Also where the text of a prompt would be tokenised otherwise."""
    (letter,) = (i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "W")
    (rest,) = (i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "h")
    split = {**rows[0], "ids": [letter, rest, *rows[0]["ids"]], "mask": [False, False, *rows[0]["mask"]]}
    prompt = split["ids"][: last_turn(split)]
    assert tokenizer(str(tokenizer.decode(prompt)), add_special_tokens=False)["input_ids"] != prompt
    model: Any = load_model(pico_base)
    (answered,) = answer_rows(model, tokenizer, [split], EVALUATE)
    new = model.generate(torch.tensor([prompt]), max_new_tokens=EVALUATE.max_new_tokens, do_sample=False)
    assert answered.prediction == str(tokenizer.decode(new[0, len(prompt) :], skip_special_tokens=True)).strip()


def made(correct: list[bool], losses: list[float], tokens: list[int], family: str = "f") -> list[Item]:
    return [
        Item("held_out", family, str(n), "p", prompt_digest("p"), "t", "a", float(c), -loss * k, k)
        for n, (c, loss, k) in enumerate(zip(correct, losses, tokens, strict=True))
    ]


def test_the_bootstrap_interval_is_scipys() -> None:
    sample = np.random.default_rng(0).random(80) < 0.7
    params = EVALUATE.model_copy(update={"bootstrap_samples": 20_000, "confidence": 0.9, "seed": 3})
    ours = bootstrap(sample.tolist(), params.resampling)
    theirs = stats.bootstrap(
        (sample.astype(float),), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile"
    )
    assert ours.mean == sample.mean()
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.013)  # one row is 0.0125
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.013)
    assert bootstrap([1.0] * 5, params.resampling) == (1.0, 1.0, 1.0)
    assert bootstrap(sample.tolist(), params.resampling) == ours


def test_metrics_worked_out_by_hand() -> None:
    base = made([False, False, True, False], [2.0, 4.0, 1.0, 3.0], [1, 1, 2, 4])
    answers = made([True, True, False, False], [1.0, 1.0, 1.0, 0.5], [1, 1, 2, 4])
    metrics = metrics_of("m", answers, base, EVALUATE)
    assert metrics["exact_match"]["mean"] == 0.5
    assert metrics["loss"] == pytest.approx((1 + 1 + 2 + 2) / 8)
    assert metrics["gain_over_base"]["mean"] == 0.25  # two won, one lost, of four
    assert metrics["base"] == {"exact_match": 0.25, "loss": pytest.approx((2 + 4 + 2 + 12) / 8)}
    assert metrics["families"] == {"f": {"rows": 4, "exact_match": 0.5}}
    assert mean_loss(answers) == metrics["loss"]
    assert "base" not in metrics_of("m", answers, None, EVALUATE)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], tmp_path_factory: Any) -> Path:
    """Held-out rows as `render` writes them."""
    folder: Path = tmp_path_factory.mktemp("data") / "rendered"
    with atomic_folder(folder, {"template_sha256": template_digest(tokenizer)}) as draft:
        (draft / "held_out").mkdir()
        write_table(draft / "held_out" / "chat.parquet", pa.Table.from_pylist(rows))
    return folder


@pytest.fixture(scope="module")
def model(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model as `merge` writes it."""
    folder = tmp_path_factory.mktemp("models") / "m"
    with atomic_folder(folder) as draft:
        for file in pico_base.iterdir():
            shutil.copy(file, draft)
    return folder


@pytest.fixture(scope="module")
def with_suites(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Params with a suite of rows and a general text."""
    folder = tmp_path_factory.mktemp("own")
    exam = write_lines(folder / "exam.jsonl", [{"question": "狗?", "choices": ["dog", "cat"], "answer": 0}] * 3)
    (folder / "text.txt").write_text("The cat sat on the mat.\n\nA dog ran.\n\n" * 40)
    text = GeneralText(path=str(folder / "text.txt"), sha256="none", max_tokens=300)
    return EVALUATE.model_copy(update={"suites": {"exam": rows_suite(exam, CHOICE, MULTIPLE)}, "general_text": text})


def test_a_report_holds_all_suites_and_is_the_same_twice(
    model: Path, rendered: Path, with_suites: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, base in (("base", None), ("m", tmp_path / "base" / EXAMPLES)):
        evaluate_model(model, rendered, tmp_path / name, name, base, with_suites, tmp_path / "state")
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    items = read_items(tmp_path / "m" / EXAMPLES)
    assert [item.suite for item in items] == ["held_out"] * 4 + ["exam"] * 3
    assert [item.task for item in items] == ["f0", "f1", "f0", "f1", "one", "one", "one"]
    assert {suite: each["rows"] for suite, each in metrics["suites"].items()} == {"held_out": 4, "exam": 3}
    assert metrics["suites"]["held_out"]["score"] == metrics["exact_match"]
    assert metrics["gain_over_base"]["mean"] == 0.0
    assert metrics["forgetting"]["loss"] == metrics["forgetting"]["base_loss"]
    cost = json.loads((tmp_path / "state" / "costs" / "base.json").read_text())
    assert cost["tokens_per_s"] == pytest.approx(cost["tokens"] / cost["seconds"])
    assert not (tmp_path / "state" / "costs" / "m.json").exists()  # it is the same model, so nothing was asked
    monkeypatch.setattr("tasks.evaluate.model_under_test.load_packaged", lambda *_, **__: pytest.fail("loaded"))
    before = {file: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    evaluate_model(model, rendered, tmp_path / "m", "m", tmp_path / "base" / EXAMPLES, with_suites, tmp_path / "state")
    assert {file: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_what_is_forgotten_is_the_loss_on_the_text(model: Path, with_suites: Evaluate) -> None:
    """Against transformers' own loss, window by window."""
    examinee = ModelUnderTest(model, with_suites, None, chats=True)
    examinee.model.float()
    assert isinstance(with_suites.general_text, GeneralText)
    assert examinee.room == 256
    found = general_loss(examinee, with_suites.general_text)
    texts = [text for text in Path(with_suites.general_text.path).read_text().split("\n\n") if text]
    ids = [token for text in texts for token in examinee.tokenizer(text)["input_ids"]][:300]
    total = 0.0
    for start in range(0, 299, 127):  # half of what the model reads
        window = torch.tensor([ids[start : start + 128]])
        total += float(examinee.model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
    assert found.tokens == 299
    assert found.loss == pytest.approx(total / 299, rel=1e-5)


def test_a_model_with_another_template_is_refused(model: Path, rendered: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with atomic_folder(other) as draft:
        for file in model.iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, draft)
        (draft / "chat_template.jinja").write_text((draft / "chat_template.jinja").read_text() + " ")
    with pytest.raises(BadModel, match="its chat template is not the one that the rows were rendered with") as refused:
        evaluate_model(other, rendered, tmp_path / "out", "m", None, EVALUATE, None)
    assert refused.value.exit_code == 65
    assert not (tmp_path / "out").exists()


def test_reports_of_other_questions_are_refused(
    model: Path, rendered: Path, with_suites: Evaluate, tmp_path: Path
) -> None:
    """Row 76: the base's results must be of the same rows, and of the same text."""
    plain = EVALUATE.model_copy(update={"rows": 2})
    evaluate_model(model, rendered, tmp_path / "base", "base", None, plain, tmp_path)
    base = tmp_path / "base" / EXAMPLES
    with pytest.raises(BadData, match="2 of 4 held-out rows are not those that the base model answered"):
        evaluate_model(model, rendered, tmp_path / "out", "m", base, EVALUATE, tmp_path)
    with pytest.raises(BadData, match="the base model has no loss on this general text"):
        evaluate_model(
            model, rendered, tmp_path / "out", "m", base, with_suites.model_copy(update={"rows": 2}), tmp_path
        )
    old = tmp_path / "old.parquet"
    write_rows(old, [{"id": "1", "correct": True}], pa.schema([("id", pa.string()), ("correct", pa.bool_())]))
    with pytest.raises(BadData, match="is no report of items"):
        evaluate_model(model, rendered, tmp_path / "out", "m", old, plain, tmp_path)
    assert not (tmp_path / "out").exists()


def test_held_out_is_the_name_of_no_suite() -> None:
    with pytest.raises(ValidationError, match="held_out is the name of the held-out rows"):
        Evaluate.model_validate(
            {**EVALUATE.model_dump(), "suites": {"held_out": rows_suite("x", CHOICE, MULTIPLE).model_dump()}}
        )
