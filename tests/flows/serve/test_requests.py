from __future__ import annotations

import json
from typing import Any

import pytest

from flows.serve.errors import ApiError
from flows.serve.requests import MAX_MESSAGES, ChatRequest, CompletionRequest, FeedbackRequest, parse
from tasks.core.records import calls_with_ids
from tasks.inference.params import GREEDY

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO, **fields}).encode()


def refused(body: bytes, form: Any = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, form)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8: byte 0"),
        (chat()[:-1] + b"\x80", "not UTF-8"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "m", "temperature": NaN}', "NaN is no number"),
        (b'{"model": "m", "temperature": -Infinity}', "-Infinity is no number"),
        (b'{"model": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_said(body: bytes, said: str) -> None:
    error = refused(body)
    assert error.code == "invalid_json"
    assert said in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "who": 1}]}, "messages[0].who"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 2**40}, "max_completion_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": list("abcde")}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"user": "x" * 300}, "user"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"stream_options": {"what": 1}}, "stream_options.what"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str | None) -> None:
    error = refused(chat(**fields))
    assert error.param == param
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0001},
        {"top_logprobs": 2},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_schema"}},
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any]) -> None:
    assert refused(chat(**fields)).code == "invalid_value"


def test_a_number_beyond_all_is_refused() -> None:
    assert refused(b'{"model": "m", "temperature": 1e999}').param == "temperature"


def test_ten_thousand_messages_are_too_many() -> None:
    error = refused(chat(messages=HELLO * 10_000))
    assert (error.param, error.code) == ("messages", "array_above_max_length")
    assert parse(chat(messages=HELLO * MAX_MESSAGES), ChatRequest).messages


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"logit_bias": {"5": 1}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"parallel_tool_calls": False},
        {"modalities": ["text", "audio"]},
        {"functions": [{"name": "f"}]},
        {"store": True},
        {"reasoning_effort": "high"},
    ],
)
def test_what_openai_has_and_this_server_has_not_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    error = refused(chat(**fields))
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message.startswith(name)


def test_a_field_that_nobody_knows_is_refused() -> None:
    error = refused(chat(temprature=1))
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


def test_values_that_ask_for_nothing_and_nulls_are_taken() -> None:
    fields = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "store": False,
        "n": None,
        "stop": None,
    }
    fields |= {"tool_choice": "auto", "service_tier": "auto", "parallel_tool_calls": True, "user": None, "audio": None}
    found = parse(chat(**fields), ChatRequest)
    assert (found.n, found.stop, found.user) == (1, [], "")


def test_without_options_an_answer_is_greedy() -> None:
    assert parse(chat(), ChatRequest).generation(0) == GREEDY
    assert parse(chat(temperature=0, top_p=0.9, top_k=4), ChatRequest).generation(0) == GREEDY


def test_options_are_those_of_generation() -> None:
    found = parse(chat(temperature=1, top_p=0.9, top_k=4, repetition_penalty=1.2, repetition_range=3), ChatRequest)
    drawn = {"temperature": 1, "top_p": 0.9, "top_k": 4, "repetition_penalty": 1.2, "repetition_range": 3}
    assert found.generation(2**31 + 5).model_dump() == {**drawn, "seed": 5}


def test_a_conversation_becomes_turns() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    system, user, assistant, tool = (m.message() for m in parse(chat(messages=messages), ChatRequest).messages)
    assert (system.role, user.content, user.name) == ("system", "ab", "me")
    assert calls_with_ids(assistant) == [("c1", {"name": "f", "arguments": {"x": 1}, "text": '{"x": 1}'})]
    assert (tool.role, tool.content, tool.call_id) == ("tool", "2", "c1")
    assert parse(chat(messages=messages), ChatRequest).opening() == "ab"


def test_nulls_within_schemas_are_values() -> None:
    schema = {"enum": [None, 1], "default": None}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert parse(chat(response_format=form), ChatRequest).response_format.schema_of_answer() == schema


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_come_in_four_forms(prompt: Any, expected: Any) -> None:
    assert parse(json.dumps({"model": "m", "prompt": prompt}).encode(), CompletionRequest).prompts() == expected


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([], "prompt"), (["a"] * 65, "prompt"), ([-1], "prompt[0]"), ([1, "a"], "prompt[1]"), ({}, "prompt")],
)
def test_prompts_of_other_forms_are_refused(prompt: Any, param: str) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    with pytest.raises(ApiError) as caught:
        parse(body, CompletionRequest).prompts()
    assert caught.value.param == param


@pytest.mark.parametrize(
    "said",
    [{}, {"thumb": "sideways"}, {"thumb": "up", "better": "x"}, {"preferred_over": "a"}, {"better": ""}],
)
def test_feedback_says_one_thing(said: dict[str, Any]) -> None:
    refused(json.dumps({"id": "a", **said}).encode(), FeedbackRequest)
