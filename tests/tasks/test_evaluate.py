from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from tasks.chat import answer
from tasks.errors import BadData
from tasks.evaluate import answer_rows, last_turn, metrics_of, token_logps
from tasks.generation_params import GREEDY
from tasks.intervals import bootstrap
from tasks.items import Item, digest_of, mean_loss
from tasks.models import load_model
from tasks.records import Message
from tasks.templates import render_chat
from tests.samples import EVALUATE

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


@pytest.mark.parametrize("batch_rows", [1, 3, 4])
def test_drawn_answers_are_those_that_serving_gives_in_any_batch(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], batch_rows: int
) -> None:
    """lm-eval sorts rows by length and pads them; a row's draws depend on the seed and its prompt alone."""
    model = load_model(pico_base).float()
    options = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "repetition_range": 4, "seed": 5}
    generation = GREEDY.model_copy(update=options)
    params = EVALUATE.model_copy(update={"batch_rows": batch_rows, "max_new_tokens": 12, "generation": generation})
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
        Item("held_out", family, str(n), "p", digest_of("p"), "t", "a", float(c), -loss * k, k)
        for n, (c, loss, k) in enumerate(zip(correct, losses, tokens, strict=True))
    ]


def test_the_bootstrap_interval_is_scipys() -> None:
    sample = np.random.default_rng(0).random(80) < 0.7
    params = EVALUATE.model_copy(update={"bootstrap_samples": 20_000, "confidence": 0.9, "seed": 3})
    ours = bootstrap(sample.tolist(), params)
    theirs = stats.bootstrap(
        (sample.astype(float),), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile"
    )
    assert ours.mean == sample.mean()
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.013)  # one row is 0.0125
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.013)
    assert bootstrap([1.0] * 5, params) == (1.0, 1.0, 1.0)
    assert bootstrap(sample.tolist(), params) == ours


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
