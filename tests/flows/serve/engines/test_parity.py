"""Whether tokens are temper's own: held against transformers' `generate`, and against tokens that are nearly so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from flows.serve.engines.parity import EXACT, PROBE_TOKENS, PROBES, check_parity, probe_prompts
from tasks.core.errors import NotEquivalent
from tasks.core.records import Message
from tasks.inference.decoding import Asked
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import render_prompt

Write = Callable[[Asked], tuple[list[int], str]]


@pytest.fixture(scope="module")
def model(pico_base: Path) -> Any:
    return load_model(pico_base)


@pytest.fixture(scope="module")
def generate(pico_base: Path, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Greedy tokens of transformers."""
    own: Any = AutoModelForCausalLM.from_pretrained(pico_base, dtype=torch.float32)

    def write(asked: Asked) -> tuple[list[int], str]:
        ids = torch.tensor([asked.prompt])
        new = own.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.max_tokens, do_sample=False, pad_token_id=0
        )
        found = new[0, len(asked.prompt) :].tolist()
        return found, "stop" if found[-1] == tokenizer.eos_token_id else "length"

    return write


def check(write: Write, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    prompts = probe_prompts(tokenizer, 256)
    ends = frozenset([int(tokenizer.eos_token_id)])
    return check_parity(write, model, tokenizer, prompts, ends, exact=True, where="m/1 by x")


def test_prompts_are_those_of_requests_and_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = probe_prompts(tokenizer, None)
    assert prompts == [render_prompt(tokenizer, [Message("user", text)]) for text in PROBES]
    shortest = min(map(len, prompts))
    assert [len(prompt) for prompt in probe_prompts(tokenizer, shortest + PROBE_TOKENS)] == [shortest]


def test_the_tokens_of_transformers_are_accepted(
    generate: Write, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = check(generate, model, tokenizer)
    assert (found.prompts, found.ties) == (len(PROBES), 0)
    assert found.tokens == sum(len(generate(Asked(tuple(p), PROBE_TOKENS))[0]) for p in probe_prompts(tokenizer, 256))


def test_the_first_other_token_is_named(generate: Write, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    def write(asked: Asked) -> tuple[list[int], str]:
        new, reason = generate(asked)
        logits = model(torch.tensor([[*asked.prompt, *new[:4]]])).logits[0, -1]
        return [*new[:4], int(logits.argmin()), *new[5:]], reason

    with pytest.raises(NotEquivalent, match="other tokens") as caught:
        check(write, model, tokenizer)
    assert "m/1 by x, prompt 1, token 5" in str(caught.value)
    (prompt, *_) = probe_prompts(tokenizer, 256)
    assert caught.value.expected.startswith(f"{generate(Asked(tuple(prompt), 5))[0][4]} (")


def test_nearly_as_likely_a_token_is_a_tie_and_the_comparison_goes_on(
    generate: Write, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The logits of the fourth token's place are moved so that another one is within, or beyond, the bound."""

    class Nudged:
        device, dtype = model.device, model.dtype

        def __init__(self, behind: float) -> None:
            self.behind = behind

        def __call__(self, input_ids: Any, use_cache: bool) -> Any:
            out = model(input_ids=input_ids, use_cache=use_cache)
            place, token = -PROBE_TOKENS + 3 - 1, int(input_ids[0, -PROBE_TOKENS + 3])
            row = out.logits[0, place]
            likeliest = int(row.argsort()[-2])
            for _ in range(20):  # the standard deviation moves a little with it
                row[likeliest] = row[token] + self.behind * row.std()
            return out

    for behind, accepted in ((0.5 * EXACT, True), (1.5 * EXACT, False)):
        nudged: Any = Nudged(behind)
        if accepted:
            found = check(generate, nudged, tokenizer)
            assert (found.ties, found.prompts) == (len(PROBES), len(PROBES))
            assert str(found).endswith(f"of which {len(PROBES)} are ties by rounding")
        else:
            with pytest.raises(NotEquivalent, match="other tokens"):
                check(generate, nudged, tokenizer)


def test_an_answer_ends_where_it_should(generate: Write, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    end = int(tokenizer.eos_token_id)
    for new, reason in (
        ([5, 6], "length"),  # too short
        ([5, 6], "stop"),  # without its end token
        ([5, end, 6], "stop"),  # it went on
        ([5, end] + [6] * (PROBE_TOKENS - 2), "length"),
    ):
        with pytest.raises(NotEquivalent, match="ends answers elsewhere"):
            check(lambda asked, told=(new, reason): told, model, tokenizer)  # type: ignore[misc]
