from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.inference.params import GREEDY, Generation
from tasks.inference.sampling import GumbelNoise, RepetitionPenalty, decoding, row_generator
from tasks.models.loader import Model, load_model
from tasks.tokenization.chat_template import load_tokenizer, render_prompt

QUESTIONS = ["Hello", "What is 1 plus 2?", "狗?", "Count the animals: cat, dog, cow, cat", "Which word is last: a b c"]
CPU = torch.device("cpu")


def asked(**options: float) -> Generation:
    return Generation.model_validate({**GREEDY.model_dump(), **options})


@pytest.fixture(scope="module")
def model(pico_base: Path) -> Model:
    return load_model(pico_base).float()


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0)
    model: Any = T5ForConditionalGeneration(config).eval()
    model.generation_config.decoder_start_token_id = 0
    model.lm_head.weight.data.normal_(0, 2)  # scores that differ
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [render_prompt(tokenizer, [Message("user", question)]) for question in QUESTIONS]


def written(model: Any, prompts: Sequence[Sequence[int]], options: Generation, tokens: int = 16) -> list[list[int]]:
    """What is generated for prompts in one batch: padded on the left for a decoder, on the right for an encoder."""
    longest, right = max(map(len, prompts)), model.config.is_encoder_decoder
    ids, attended = torch.zeros(2, len(prompts), longest, dtype=torch.long).unbind()
    for row, mask, prompt in zip(ids, attended, prompts, strict=True):
        place = slice(0, len(prompt)) if right else slice(longest - len(prompt), longest)
        row[place], mask[place] = torch.tensor(prompt), 1
    out = model.generate(
        input_ids=ids,
        attention_mask=attended,
        max_new_tokens=tokens,
        eos_token_id=1,
        pad_token_id=0,
        **decoding(model, options, prompts, start=1 if right else longest),
    )
    rows = out[:, 1 if right else longest :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


# --- repetition penalty -----------------------------------------------------------------------------------------------


def penalised(logits: Tensor, generated: Sequence[int], penalty: float, last: int) -> Tensor:
    """CTRL's rule by hand for one row: each token among the last generated ones, once."""
    logits = logits.clone()
    for token in set(generated[-last:] if last else generated):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


@pytest.mark.parametrize("last", [0, 1, 3, 6, 100])
def test_the_penalty_is_ctrls_on_the_last_generated_tokens(last: int) -> None:
    torch.manual_seed(1)
    ids, scores = torch.randint(0, 12, (5, 11)), torch.randn(5, 12)
    scores[0, 3] = -torch.inf
    found = RepetitionPenalty(1.7, 5, last)(ids, scores)
    expected = torch.stack([penalised(row, r[5:], 1.7, last) for row, r in zip(scores, ids.tolist(), strict=True)])
    assert torch.equal(found, expected)
    assert not torch.equal(found, scores)


def test_with_no_range_it_is_transformers_own() -> None:
    torch.manual_seed(2)
    ids, scores = torch.randint(0, 30, (4, 9)), torch.randn(4, 30)
    theirs = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=4)
    assert torch.equal(RepetitionPenalty(1.3, 4, 0)(ids, scores), theirs(ids, scores.clone()))


@pytest.mark.parametrize("last", [0, 2, 30])
def test_it_never_looks_at_the_prompt(last: int) -> None:
    scores = torch.randn(2, 9)
    prompt = torch.randint(0, 9, (2, 6))
    assert torch.equal(RepetitionPenalty(2.0, 6, last)(prompt, scores), scores)


def by_hand(model: Any, prompt: Sequence[int], options: Generation, tokens: int) -> list[int]:
    """Greedy decoding of one prompt, token by token, without a cache."""
    made: list[int] = []
    given = torch.tensor([prompt])
    while len(made) < tokens and 1 not in made:
        after = {"decoder_input_ids": torch.tensor([[0, *made]])} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            logits = model(given if after else torch.tensor([[*prompt, *made]]), **after).logits[0, -1]
        made.append(int(penalised(logits, made, options.repetition_penalty, options.repetition_range).argmax()))
    return made


@pytest.mark.parametrize("last", [0, 2])
def test_a_padded_batch_is_penalised_as_each_prompt_alone_by_hand(
    model: Model, prompts: list[list[int]], last: int
) -> None:
    options = asked(repetition_penalty=1.5, repetition_range=last)
    assert written(model, prompts, options) == [by_hand(model, prompt, options, 16) for prompt in prompts]


@pytest.mark.parametrize("last", [0, 2])
def test_an_encoder_decoder_is_penalised_from_its_start_token_on(t5: Any, last: int) -> None:
    options = asked(repetition_penalty=2.5, repetition_range=last)
    inputs = [[5, 6, 7, 8, 9, 1], [20, 21, 1], [30, 31, 32, 33, 1]]
    found = written(t5, inputs, options)
    assert found == [by_hand(t5, each, options, 16) for each in inputs]
    assert found != written(t5, inputs, asked(repetition_penalty=2.5, repetition_range=2 - last))


def test_a_range_lets_a_token_come_back(model: Model, prompts: list[list[int]]) -> None:
    all_ = written(model, prompts, asked(repetition_penalty=100.0), 24)
    near = written(model, prompts, asked(repetition_penalty=100.0, repetition_range=2), 24)
    assert all(len(set(row)) == len(row) for row in all_)
    assert any(len(set(row)) < len(row) for row in near)
    assert all(len({*row[i : i + 3]}) == len(row[i : i + 3]) for row in near for i in range(len(row)))


# --- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_is_what_generate_does_by_itself(model: Any, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[1]])
    options = decoding(model, GREEDY, ids.tolist(), start=ids.shape[1])
    assert list(options["logits_processor"]) == []
    given: dict[str, Any] = {"max_new_tokens": 20, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **given)
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))


def test_the_models_own_generation_config_changes_nothing(pico_base: Path, prompts: list[list[int]]) -> None:
    """Such as Qwen's penalty of 1.05, BART's beams, or Llama's temperature."""
    model: Any = load_model(pico_base).float()
    greedy, drawn = asked(), asked(temperature=0.8, top_k=50, seed=3)
    expected = [written(model, prompts, options) for options in (greedy, drawn)]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    assert [written(model, prompts, options) for options in (greedy, drawn)] == expected


@pytest.mark.parametrize(
    "own",
    [
        {"sequence_bias": [[[5], 50.0]]},
        {"forced_eos_token_id": 2},
        {"forced_bos_token_id": 9},
        {"exponential_decay_length_penalty": [1, 9.0]},
        {"max_time": 1e-6},
        {"min_new_tokens": 10},
        {"suppress_tokens": list(range(3, 300))},
        {"bad_words_ids": [[n] for n in range(3, 300)]},
        {"guidance_scale": 3.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"stop_strings": ["a", "e"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"eos_token_id": list(range(3, 300))},
    ],
    ids=lambda own: next(iter(own)),
)
def test_nothing_else_that_it_may_say_changes_a_reply(pico_base: Path, own: dict[str, Any]) -> None:
    tokenizer, asked_ = load_tokenizer(pico_base), [Message("user", QUESTIONS[1])]
    model: Any = load_model(pico_base)
    plain = answer(model, tokenizer, asked_, 12)
    model.generation_config = GenerationConfig(**own)
    assert answer(model, tokenizer, asked_, 12) == plain


def test_the_start_token_of_an_encoder_decoder_is_kept(t5: Any) -> None:
    t5.generation_config = GenerationConfig(decoder_start_token_id=7, sequence_bias=[[[5], 50.0]])
    ids = torch.tensor([[5, 6, 1]])
    out = t5.generate(ids, max_new_tokens=3, **decoding(t5, GREEDY, ids.tolist(), start=1))
    assert out[0, 0] == 7
    assert out[0, 1:].tolist() != [5, 5, 5]


# --- drawn ------------------------------------------------------------------------------------------------------------


def draws(logits: Tensor, options: Generation, count: int, model: Any) -> Tensor:
    """The tokens drawn from the same logits for so many prompts."""
    ids = torch.arange(count)[:, None]
    process = decoding(model, options, ids.tolist(), start=ids.shape[1])["logits_processor"]
    drawn: Tensor = process(ids, logits.expand(count, -1)).argmax(1)
    return drawn


def test_draws_are_distributed_as_transformers_own_warpers_say(model: Any, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[1]])
    options = asked(temperature=0.3, top_k=12, top_p=0.9, seed=5)
    given: dict[str, Any] = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    raw = model.generate(ids, do_sample=False, **given).scores[0]
    warped = model.generate(ids, do_sample=True, temperature=0.3, top_k=12, top_p=0.9, **given).scores[0]
    ours = decoding(model, options, ids.tolist(), start=ids.shape[1])["logits_processor"][:-1]
    for processor in ours:
        raw = processor(ids, raw)
    assert torch.equal(raw, warped)
    logits = model.generate(ids, do_sample=False, **given).scores[0]
    counts = draws(logits, options, 6000, model).bincount(minlength=logits.shape[1])
    kept = warped[0].isfinite()
    assert 3 < kept.sum() <= 12
    assert counts[~kept].sum() == 0
    expected = warped[0, kept].double().softmax(0) * 6000
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 0.01


def test_draws_of_many_seeds_and_steps_are_the_softmax_and_independent() -> None:
    """One prompt under many seeds, two tokens each: 16 cells against the product of the two distributions."""
    ids, first, second = (
        torch.tensor([[7, 8]]),
        torch.tensor([[0.5, -1.0, 1.5, 0.0]]),
        torch.tensor([[2.0, 0, 0.3, -1]]),
    )
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(4000):
        noise = GumbelNoise([row_generator(seed, [7, 8], CPU)])
        pairs[int(noise(ids, first).argmax()), int(noise(ids, second).argmax())] += 1
    found = np.array([[pairs[a, b] for b in range(4)] for a in range(4)])
    expected = np.outer(first.double().softmax(1), second.double().softmax(1)) * 4000
    assert stats.chisquare(found.ravel(), expected.ravel()).pvalue > 0.01


def test_texts_of_a_tiny_model_have_the_probabilities_that_it_gives_them() -> None:
    """All 27 texts of three tokens, by the chain rule, against 5000 that `generate` wrote."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        initializer_range=1.0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).eval()
    prompt, count = torch.tensor([[2, 0]]), 5000
    options = decoding(model, asked(temperature=1.0), prompt.tolist(), start=2)
    options["logits_processor"][-1].generators = [row_generator(seed, [2, 0], CPU) for seed in range(count)]
    many = prompt.expand(count, -1)
    out = model.generate(many, attention_mask=torch.ones_like(many), max_new_tokens=3, pad_token_id=0, **options)[:, 2:]
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with torch.no_grad():
        logp = model(torch.cat([prompt.expand(27, -1), texts], 1)).logits.double().log_softmax(-1)
    expected = logp[:, 1:-1].gather(2, texts[:, :, None]).sum((1, 2)).exp() * count
    found = (out @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    often = expected >= 5
    assert expected.sum().item() == pytest.approx(count)
    cells = [np.array([*each[often].tolist(), each[~often].sum().item()]) for each in (found, expected)]
    assert stats.chisquare(cells[0], cells[1]).pvalue > 0.01


def test_the_same_seed_and_prompt_give_the_same_text_alone_and_in_any_batch(
    model: Model, prompts: list[list[int]]
) -> None:
    options = asked(temperature=1.0, top_p=0.95, repetition_penalty=1.2, repetition_range=4, seed=9)
    alone = [written(model, [prompt], options)[0] for prompt in prompts]
    assert len({tuple(row) for row in alone}) == len(prompts)
    assert written(model, prompts, options) == alone
    assert written(model, prompts[::-1], options) == alone[::-1]
    assert written(model, prompts[1:3], options) == alone[1:3]
    torch.manual_seed(123)  # the global generator has no part in it
    assert written(model, prompts, options) == alone
    assert written(model, prompts, options.model_copy(update={"seed": 10})) != alone


def test_an_encoder_decoder_draws_the_same_alone_and_in_a_batch(t5: Any) -> None:
    options = asked(temperature=2.0, seed=1)
    inputs = [[5, 6, 7, 8, 9, 1], [20, 21, 1], [30, 31, 32, 33, 1]]
    assert written(t5, inputs, options) == [written(t5, [each], options)[0] for each in inputs]


def test_little_rounding_changes_few_draws(model: Any) -> None:
    """With the noise as it was, a draw changes at most about as often as the distributions differ."""
    torch.manual_seed(4)
    logits = torch.randn(1, 400)
    rounded = logits.bfloat16().float()
    apart = (logits.softmax(1) - rounded.softmax(1)).abs().sum() / 2
    changed = draws(logits, asked(temperature=1.0), 4000, model) != draws(rounded, asked(temperature=1.0), 4000, model)
    assert changed.float().mean() < 3 * apart


def test_hardly_any_temperature_is_greedy(model: Any) -> None:
    logits = torch.randn(1, 400) * 10
    assert draws(logits, asked(temperature=0.001), 50, model).unique().tolist() == [int(logits.argmax())]
