"""The HTTP API, asked by the official client and by plain requests, of a server that listens."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from flows.serve.keys import Key
from flows.serve.record import Record
from flows.serve.tool_calls import tools_of
from tasks.adapters.attach import attach
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.inference.decoding import Ended, Written
from tasks.models.loader import load_model
from tasks.tokenization.chat_template import load_tokenizer, render_prompt
from tests.conftest import ROOT
from tests.flows.serve.serving import scripted, serving
from tests.flows.serve.test_tool_calls import QWEN, with_template
from tests.tasks.adapters.test_files import published

TINY = ROOT / "models" / "tiny"
VERSION = f"tiny@{hashlib.sha256((TINY / 'manifest.json').read_bytes()).hexdigest()[:12]}"
HELLO: Any = [{"role": "user", "content": "Hello"}]
DRAWN: dict[str, Any] = {"temperature": 1.3, "seed": 5, "max_tokens": 24}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of different methods, which stand on one base."""
    return {name: published(TINY, name, tmp_path_factory.mktemp(name)) for name in ("lora", "houlsby")}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record") / "said.db"


@pytest.fixture(scope="module")
def address(adapters: dict[str, Path], record: Path) -> Iterator[str]:
    kept = Record(record)
    with serving(TINY, kept, adapters=adapters) as address:
        yield address
    kept.close()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def expected(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> Any:
    return answer(load_model(TINY), tokenizer, [Message("user", text)], tokens)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello", "What is 17 plus 25?", "数一数动物：牛，猪"])
def test_a_greedy_answer_is_the_one_of_every_other_way_to_ask(
    client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    reply = expected(tokenizer, text, 12)
    assert reply.text
    messages: Any = [{"role": "user", "content": text}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert whole.choices[0].message.content == reply.text
    assert whole.choices[0].finish_reason == ("stop" if reply.stopped else "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (reply.prompt_tokens, reply.tokens)
    assert whole.system_fingerprint == VERSION
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == reply.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_adapters_answer_under_their_own_names(
    client: openai.OpenAI, adapters: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = {"tiny": expected(tokenizer, "Hello", 12).text}
    for name, folder in adapters.items():
        tuned = attach(load_model(TINY), folder)
        texts[name] = answer(tuned, tokenizer, [Message("user", "Hello")], 12).text
    assert len(set(texts.values())) == 3
    for model in ("lora", "tiny", "houlsby", "lora", "tiny"):
        whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12)
        assert (whole.choices[0].message.content, whole.model) == (texts[model], model)
    assert [model.id for model in client.models.list()] == ["tiny", "lora", "houlsby"]
    assert client.models.retrieve("lora").owned_by == "temper"


def test_several_answers_have_the_seeds_that_follow(client: openai.OpenAI) -> None:
    several = client.chat.completions.create(model="tiny", messages=HELLO, n=3, **DRAWN)
    alone = [
        client.chat.completions.create(model="tiny", messages=HELLO, **{**DRAWN, "seed": seed}) for seed in (5, 6, 7)
    ]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [each.choices[0].message.content for each in alone]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True, **DRAWN):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_without_a_seed_an_answer_is_drawn_anew(client: openai.OpenAI) -> None:
    texts = {
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=16, temperature=2)
        .choices[0]
        .message.content
        for _ in range(4)
    }
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_is_cut_off_exactly(client: openai.OpenAI, stream: bool) -> None:
    prompt: dict[str, Any] = {"model": "tiny", "prompt": "Hello", **DRAWN}
    text = client.completions.create(**prompt).choices[0].text
    for place in range(1, len(text) - 3):
        stop = text[place : place + 3]
        given = client.completions.create(**prompt, stop=[stop, "never said"], stream=stream)
        chunks: list[Any] = list(given) if stream else [given]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    import torch

    from flows.serve.json_schema import Grammars

    whole = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, **DRAWN | {"stop": None}
    )
    assert whole.choices[0].logprobs is not None
    given = whole.choices[0].logprobs.content or []
    text = b"".join(bytes(each.bytes or []) for each in given)
    assert text.decode("utf-8", "replace").strip() == whole.choices[0].message.content
    # the tokens again, from their bytes: each is one of the vocabulary
    trie = Grammars(tokenizer, len(tokenizer)).trie("logprobs")
    by_bytes = {bytes(trie.decode_bytes([token])): token for token in range(len(tokenizer))}
    ids = [by_bytes[bytes(each.bytes or [])] for each in given]
    prompt = render_prompt(tokenizer, [Message("user", "Hello")])
    with torch.no_grad():
        logits = load_model(TINY)(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    for place, (token, each) in enumerate(zip(ids, given, strict=True)):
        here = logits[len(prompt) + place - 1]
        assert each.logprob == pytest.approx(float(here[token]), abs=2e-2)
        best = here.topk(3).values.tolist()
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best, abs=2e-2)
    chunks = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, stream=True, **DRAWN
    )
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == given


def test_logprobs_of_completions_have_their_old_form(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="Hello", logprobs=2, **DRAWN).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.tokens or []
    assert "".join(tokens).replace("\ufffd", "") == choice.text.replace("\ufffd", "")
    assert len(tokens) == len(choice.logprobs.token_logprobs or []) == len(choice.logprobs.top_logprobs or [])


def test_prompts_are_gone_on_with_each_for_itself(client: openai.OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Hello", "What is"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    alone = [client.completions.create(model="tiny", prompt=text, max_tokens=6).choices[0].text for text in texts]
    for prompt in (texts, ids):
        together = client.completions.create(model="tiny", prompt=prompt, max_tokens=6)
        assert [choice.text for choice in together.choices] == alone
    assert client.completions.create(model="tiny", prompt=ids[0], max_tokens=6).choices[0].text == alone[0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_held_to_a_json_schema(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "wild": {"type": "boolean"}},
        "required": ["kind", "wild"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    for seed in range(4):
        given: Any = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            response_format=form,
            temperature=2.0,
            seed=seed,
            max_tokens=60,
            stream=stream,
        )
        if stream:
            chunks = list(given)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            text = given.choices[0].message.content
            assert given.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text), schema)


def test_a_stream_is_whole_lines_of_whole_characters(address: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "stream": True, **DRAWN, "temperature": 3.0}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-temper-version"] == VERSION
        parts = list(response.iter_raw())
    events = b"".join(parts).split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    for event in events:
        text = event.decode()
        assert len(text.splitlines()) == 1
        assert json.loads(text.removeprefix("data: "))["object"] == "chat.completion.chunk"


TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_is_read(tokenizer: PreTrainedTokenizerBase, stream: bool) -> None:
    tokenizer = with_template(tokenizer, QWEN)
    with scripted(tokenizer, tools_of(tokenizer)) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        given: list[Any] = []

        def ask() -> None:
            answer: Any = client.chat.completions.create(model="scripted", messages=HELLO, tools=[TOOL], stream=stream)
            given.extend(answer if stream else [answer])

        asking = threading.Thread(target=ask)
        asking.start()
        engine.submitted.acquire()
        written = 'I add.<tool_call>\n{"name": "add", "arguments": {"x": 17}}\n</tool_call>'
        for token in [*tokenizer(written, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
            engine.tells[0](Written(token))
        engine.tells[0](Ended("stop"))
        asking.join()
        said = [chunk.choices[0].delta if stream else chunk.choices[0].message for chunk in given]
        assert "".join(each.content or "" for each in said) == "I add."
        (call,) = [call for each in said for call in each.tool_calls or []]
        assert (call.type, call.function.name, call.function.arguments) == ("function", "add", '{"x": 17}')
        assert given[-1].choices[0].finish_reason == "tool_calls"
        called = {"role": "assistant", "content": "I add.", "tool_calls": [call.model_dump(exclude={"index"})]}
        messages: Any = [*HELLO, called, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
        threading.Thread(target=post, args=(address, {**SCRIPTED, "messages": messages, "tools": [TOOL]})).start()
        engine.submitted.acquire()
        engine.tells[1](Ended("length"))
    prompt = str(tokenizer.decode(list(engine.asked[1].prompt)))
    assert json.dumps(TOOL) in prompt
    assert f"assistant\n{written}" in prompt.replace("I add.\n", "I add.")
    assert "tool\n42<|im_end|>\n<|im_start|>assistant\n" in prompt


# --- what is refused --------------------------------------------------------------------------------------------------


def told(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error["param"], error["code"]


def post(address: str, content: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> Any:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(
        address + path, content=body, headers={"Content-Type": "application/json", **headers}, timeout=120
    )


def test_hostile_requests_are_answered_with_their_reason_and_the_server_goes_on(address: str) -> None:
    def asking(**fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": HELLO, "max_tokens": 2, **fields}

    long = [{"role": "user", "content": "word " * 400}]
    cases: list[tuple[bytes | dict[str, Any], tuple[int, str | None, str | None]]] = [
        (asking(messages=[{"role": "user", "content": "x" * (10 << 20)}]), (413, None, "request_too_large")),
        (asking(messages=long), (400, "messages", "context_length_exceeded")),
        (asking(max_tokens=4000), (400, "messages", "context_length_exceeded")),
        (asking(messages=HELLO * 10_000), (400, "messages", "array_above_max_length")),
        (asking(model="gpt-4"), (404, "model", "model_not_found")),
        (asking(tools=[{"type": "function", "function": {"name": "f"}}]), (400, "tools", "unsupported_parameter")),
        (asking(messages=[{"role": "user", "content": ""}], n=-1), (400, "n", "invalid_value")),
        (b"\xc3\x28", (400, None, "invalid_json")),
        (b"{'model': 1}", (400, None, "invalid_json")),
        (b"", (400, None, "invalid_json")),
        (b"[" * 200_000, (400, None, "invalid_json")),
        (b'{"model": "tiny", "temperature": NaN}', (400, None, "invalid_json")),
    ]
    for body, expected_error in cases:
        assert told(post(address, body)) == expected_error
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    path = "response_format.json_schema.schema"
    assert told(post(address, asking(response_format=schema))) == (400, path, "invalid_value")
    for prompt in ("", [], [10**6], "word " * 400):
        response = post(address, {"model": "tiny", "prompt": prompt}, "/v1/completions")
        assert told(response)[:2] == (400, "prompt")
    assert told(post(address, asking(), **{"Content-Type": "text/plain"})) == (415, None, "unsupported_media_type")
    assert told(post(address, asking(), Host="evil.example")) == (403, None, "wrong_host")
    assert told(httpx.get(f"{address}/v1/nothing")) == (404, None, "not_found")
    assert told(httpx.get(f"{address}/v1/chat/completions"))[0] == 405
    assert told(httpx.get(f"{address}/v1/models/gpt-4")) == (404, "model", "model_not_found")
    assert post(address, asking()).status_code == 200
    figures = httpx.get(f"{address}/metrics").text
    assert 'status="500"' not in figures
    assert 'temper_requests_total{endpoint="chat",model="",route="",status="413",version=""} 1.0' in figures


def test_the_official_client_reads_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, presence_penalty=1.5)
    assert refused.value.param == "presence_penalty"


def test_keys_are_asked_for_on_every_path_but_health(pico_base: Path) -> None:
    key = Key("alice", hashlib.sha256(b"secret").hexdigest(), 4)
    with serving(pico_base, keys=[key]) as address:
        for path in ("/v1/models", "/metrics", "/v1/models/base"):
            assert told(httpx.get(address + path)) == (401, None, "invalid_api_key")
        assert told(post(address, {}))[0] == 401
        assert told(post(address, {}, "/v1/feedback"))[0] == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        mine = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/health", headers=mine).json()["models"][0]["version"] == "base"
        with_key = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        for _ in range(4):
            with_key.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            with_key.models.list()
        assert int(caught.value.response.headers["retry-after"]) > 0


# --- the record -------------------------------------------------------------------------------------------------------


def test_what_was_said_and_heard_is_recorded(address: str, client: openai.OpenAI, record: Path) -> None:
    asked: Any = [{"role": "user", "content": "I am a@b.org"}]
    one = client.chat.completions.create(model="tiny", messages=asked, max_tokens=4, user="me", metadata={"a": "b"})
    chunks = list(client.chat.completions.create(model="lora", messages=asked, max_tokens=4, stream=True))
    two = chunks[0].id
    for said in (
        {"id": one.id, "thumb": "up"},
        {"id": two, "better": "Hello"},
        {"id": one.id, "preferred_over": two},
    ):
        assert post(address, said, "/v1/feedback").json()["recorded"] is True
    assert told(post(address, {"id": "nobody", "thumb": "up"}, "/v1/feedback")) == (404, "id", "not_found")
    with sqlite3.connect(record) as database:
        rows = database.execute(
            "select model, adapter, version, route, prompt, answers, prompt_tokens, user, metadata"
            " from conversations where id in (?, ?) order by model",
            (one.id, two),
        ).fetchall()
        feedback = database.execute("select id, kind, value from feedback order by number").fetchall()
    assert [row[:4] for row in rows] == [("lora", "lora", VERSION, "served"), ("tiny", None, VERSION, "served")]
    assert json.loads(rows[1][4]) == [{"role": "user", "content": "I am [email]"}]
    assert json.loads(rows[1][5])[0]["content"] == one.choices[0].message.content
    assert one.usage is not None
    assert rows[1][6:] == (one.usage.prompt_tokens, "me", '{"a": "b"}')
    assert feedback == [(one.id, "thumb", "up"), (two, "better", "Hello"), (one.id, "preferred_over", two)]


def test_without_a_record_feedback_is_refused(pico_base: Path) -> None:
    with serving(pico_base) as address:
        assert told(post(address, {"id": "a", "thumb": "up"}, "/v1/feedback")) == (400, None, "no_record")


# --- what goes wrong on the way ---------------------------------------------------------------------------------------

SCRIPTED: dict[str, Any] = {"model": "scripted", "messages": HELLO, "max_tokens": 9}


def in_background(address: str, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    responses: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: responses.append(post(address, body)))
    thread.start()
    return thread, responses


def test_a_full_queue_says_when_to_come_again(tokenizer: PreTrainedTokenizerBase) -> None:
    with scripted(tokenizer) as (address, engine):
        engine.full = True
        for stream in (False, True):
            response = post(address, {**SCRIPTED, "stream": stream})
            assert told(response) == (429, None, "queue_full")
            assert int(response.headers["retry-after"]) >= 1


def test_a_model_that_fails_is_no_500(tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]) -> None:
    token = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    with scripted(tokenizer) as (address, engine):
        for stream in (False, True):
            thread, responses = in_background(address, {**SCRIPTED, "stream": stream})
            engine.submitted.acquire()
            engine.tells[-1](Written(token))
            engine.tells[-1](Ended("error", RuntimeError("Hello")))
            thread.join()
            if stream:
                last = responses[0].text.strip().split("\n\n")[-1]
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "failed"
            else:
                assert told(responses[0]) == (503, None, "failed")
            assert "Hello" not in responses[0].text
    said = capsys.readouterr().err
    assert said.count("scripted/1: an answer failed: RuntimeError at ") == 2
    assert "Hello" not in said  # what an error says may be the prompt


def test_an_answer_that_takes_too_long_is_given_up(tokenizer: PreTrainedTokenizerBase) -> None:
    with scripted(tokenizer, time_limit_s=0.2) as (address, engine):
        assert told(post(address, SCRIPTED)) == (504, None, "timeout")
        streamed = post(address, {**SCRIPTED, "stream": True}).text.strip().split("\n\n")
        assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert all(cancelled.is_set() for cancelled in engine.cancelled)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(tokenizer: PreTrainedTokenizerBase, stream: bool) -> None:
    body = {**SCRIPTED, "stream": stream}
    with scripted(tokenizer) as (address, engine), httpx.Client(timeout=httpx.Timeout(60, read=0.5)) as client:
        if stream:
            with client.stream("POST", f"{address}/v1/chat/completions", json=body):
                engine.submitted.acquire()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/chat/completions", json=body)
            engine.submitted.acquire()
        assert engine.cancelled[0].wait(60)


def test_what_a_client_leaves_unread_is_bounded(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread never waits: it is told to stop."""
    monkeypatch.setattr("flows.serve.generation.MAX_UNREAD", 4)
    token = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    with scripted(tokenizer) as (address, engine):
        thread, responses = in_background(address, SCRIPTED)
        engine.submitted.acquire()
        for _ in range(2000):
            engine.tells[0](Written(token))
        assert engine.cancelled[0].wait(60)
        thread.join()
        assert told(responses[0]) == (408, None, "unread")


def test_only_one_choice_is_ended_by_its_stop_text(tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    with scripted(tokenizer) as (address, engine):
        thread, responses = in_background(address, {**SCRIPTED, "n": 2, "stop": "b"})
        for _ in range(2):
            engine.submitted.acquire()
        engine.tells[0](Written(a))
        engine.tells[0](Written(b))
        assert engine.cancelled[0].wait(60)
        assert not engine.cancelled[1].is_set()
        engine.tells[0](Written(a))  # it had not heard of it yet
        engine.tells[0](Ended("cancelled"))
        engine.tells[1](Written(a))
        engine.tells[1](Ended("length"))
        thread.join()
        found = [(each["message"]["content"], each["finish_reason"]) for each in responses[0].json()["choices"]]
        assert found == [("a", "stop"), ("a", "length")]
