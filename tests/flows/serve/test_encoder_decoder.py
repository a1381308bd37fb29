"""An encoder-decoder behind the API: its answers are those that it gives without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tasks.inference.chat import answer_text
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer
from tests.flows.serve.serving import serving
from tests.helpers.encoder_decoders import make_base

TEXTS = ["translate: a red house", "a red house by the sea", "count: cat, dog, cat", "three cats and a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico mT5, whose answers differ by their input."""
    return make_base(tmp_path_factory.mktemp("base") / "mt5", "mt5", TEXTS)


def test_it_answers_as_it_does_alone(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with serving(folder) as address, OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for text in TEXTS:
            expected = answer_text(model, tokenizer, text, 12)
            said: Any = {"model": "mt5", "messages": [{"role": "user", "content": text}], "max_tokens": 12}
            whole = client.chat.completions.create(**said)
            assert whole.choices[0].message.content == expected.text
            assert (whole.choices[0].finish_reason == "stop") is expected.stopped
            assert whole.usage is not None
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
                expected.prompt_tokens,
                expected.tokens,
            )
            with client.chat.completions.create(**said, stream=True) as stream:
                assert "".join(part.choices[0].delta.content or "" for part in stream) == expected.text
            completed = client.completions.create(model="mt5", prompt=text, max_tokens=12)
            assert completed.choices[0].text == expected.text
        drawn = [client.completions.create(model="mt5", prompt=TEXTS[0], temperature=1, seed=n // 2) for n in range(4)]
    one, again, other, _ = (each.choices[0].text for each in drawn)
    assert one == again != other


def test_it_reads_no_turns(folder: Path) -> None:
    turns: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": TEXTS[0]}]
    with serving(folder) as address, OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        with pytest.raises(BadRequestError, match="reads one message of a user"):
            client.chat.completions.create(model="mt5", messages=turns)
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        with pytest.raises(BadRequestError, match="does not tell it of tools"):
            client.chat.completions.create(model="mt5", messages=turns[1:], tools=[tool])


def test_input_and_answer_have_a_limit_each(tmp_path: Path) -> None:
    """As BART's positions, which both count from 0; T5's have none."""
    folder = make_base(tmp_path / "short", "t5", TEXTS, max_position_embeddings=8)
    with serving(folder) as address:
        ask = {"model": "short", "prompt": "a", "max_tokens": 8}
        assert httpx.post(f"{address}/v1/completions", json=ask).status_code == httpx.codes.OK
        for wrong in ({"max_tokens": 9}, {"prompt": "a red house by the sea " * 5}):
            refused = httpx.post(f"{address}/v1/completions", json=ask | wrong)
            assert refused.json()["error"]["code"] == "context_length_exceeded"
