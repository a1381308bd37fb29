"""The server before a real `llama-server`, where TEMPER_LLAMA_SERVER says where it is, or it is on PATH."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.serve.engines.start import DIALECTS, EngineChoice
from flows.serve.versions import LoadedVersion, Settings
from tasks.core.errors import NotEquivalent
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.inference.decoding import Asked, Ended, Written
from tasks.inference.params import Generation
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer, render_prompt
from tests.conftest import ROOT
from tests.flows.serve.serving import serving

TINY = ROOT / "models" / "tiny"
PROGRAM = shutil.which(os.environ.get("TEMPER_LLAMA_SERVER") or "llama-server")
BROKEN = "\ufffd"
"""Stands for bytes that are no character."""
TEXTS = ["What is 17 plus 25?", "数一数动物：牛，猪", "Name three colours."]

pytestmark = pytest.mark.skipif(not PROGRAM, reason="no llama-server on PATH, and TEMPER_LLAMA_SERVER names none")


@pytest.fixture(scope="module", params=["bfloat16", "float32", "q8_0"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, str, list[str]]]:
    said: list[str] = []
    choice = EngineChoice(DIALECTS["llama.cpp"], Path(PROGRAM or ""), request.param, ("--threads", "1"))
    settings = Settings(slots=3, engine=choice)
    with serving(TINY, settings=settings, say=said.append) as address:
        yield request.param, address, said


def post(address: str, text: str, **more: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_its_tokens_are_held_against_those_of_temper(served: tuple[str, str, list[str]]) -> None:
    dtype, _, said = served
    assert "by llama.cpp, " in said[0]
    assert "tokens of 5 prompts as temper's own" in said[0]
    if dtype == "float32":
        assert "ties" not in said[0]


@pytest.mark.parametrize("text", TEXTS)
def test_answers_in_float32_are_those_of_temper(served: tuple[str, str, list[str]], text: str) -> None:
    dtype, address, _ = served
    if dtype != "float32":
        pytest.skip("others may differ by rounding")
    reply = answer(load_model(TINY), load_tokenizer(TINY), [Message("user", text)], 40)
    told = post(address, text, max_tokens=40)
    assert told["choices"][0]["message"]["content"] == reply.text
    assert told["choices"][0]["finish_reason"] == ("stop" if reply.stopped else "length")
    assert told["usage"]["completion_tokens"] == reply.tokens


def test_a_model_that_is_run_with_other_positions_is_refused() -> None:
    wrong = ("--rope-freq-base", "500")
    settings = Settings(slots=1, engine=EngineChoice(DIALECTS["llama.cpp"], Path(PROGRAM or ""), "bfloat16", wrong))
    with pytest.raises(NotEquivalent, match="other tokens than temper's own"):
        LoadedVersion("tiny/1", TINY, {}, settings, any_base=False)


def streamed(engine: Any, asked: Asked) -> tuple[list[int], str]:
    """The tokens of a stream, and why it ended."""
    told: queue.Queue[Written | Ended] = queue.Queue()
    engine.submit(asked, told.put)
    tokens = []
    while isinstance(event := told.get(timeout=120), Written):
        tokens.append(event.token)
    return tokens, event.reason


def test_a_stream_has_the_text_and_count_of_all_tokens_whatever_it_leaves_out() -> None:
    """Drawn at a high temperature, so that characters come in pieces, some of which are never finished.

    Asked for a whole answer, the server tells all tokens; of a stream it leaves some out.
    """
    tokenizer, compared = load_tokenizer(TINY), 0
    settings = Settings(slots=3, engine=EngineChoice(DIALECTS["llama.cpp"], Path(PROGRAM or ""), "float32"))
    version = LoadedVersion("tiny/1", TINY, {}, settings, any_base=False)
    try:
        engine: Any = version.engine
        for text, seed in product(TEXTS, range(8)):
            prompt = tuple(render_prompt(tokenizer, [Message("user", text)]))
            asked = Asked(prompt, 40, Generation(temperature=1.8, seed=seed))
            (whole, why), (parts, reason) = engine.written(asked), streamed(engine, asked)
            assert (len(parts), reason) == (len(whole), why)
            given, said = (str(tokenizer.decode(each, skip_special_tokens=True)) for each in (parts, whole))
            assert given.replace(BROKEN, "") == said.replace(BROKEN, "")
            compared += BROKEN not in said and any(len(character.encode()) > 1 for character in said)
    finally:
        version.release(finish=False)
    assert compared > 2
