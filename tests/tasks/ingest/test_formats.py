"""Every way that people write rows, as the row that it means."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, LabelledReply, Message, PreferencePair, Record, SeqPair, TextExample
from tasks.ingest.formats import FORMATS, detect, parse
from tasks.ingest.parsers import Origin
from tasks.ingest.remarks import collected

AT = Origin("s-1", "s", "f.jsonl", 1)
HERE = AT._asdict()
U, A = Message("user", "q"), Message("assistant", "a")


def read(row: Any, form: Any = "auto") -> list[Record]:
    return list(parse(row, detect(row, AT.place) if form == "auto" else form, AT))


def chat(*messages: Message, tools: tuple[str, ...] = ()) -> ChatExample:
    return ChatExample(**HERE, messages=messages, tools=tools)


def pair(chosen: str = "a", rejected: str = "b", prompt: tuple[Message, ...] = (U,), **about: Any) -> PreferencePair:
    return PreferencePair(**{**HERE, **about}, prompt=prompt, chosen=chosen, rejected=rejected)


TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"name": "find", "arguments": {"x": 1}}
CALLED = Message("assistant", "", json.dumps([CALL]))
SCHEMA = {"name": "find", "parameters": {}}

UNDERSTOOD: dict[str, tuple[str, dict[str, Any], Record]] = {
    "alpaca": ("alpaca", {"instruction": "q", "input": "", "output": "a"}, chat(U, A)),
    "alpaca with input": (
        "alpaca",
        {"instruction": "q", "input": "x", "output": "a"},
        chat(Message("user", "q\nx"), A),
    ),
    "alpaca with history": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["h", "i"]], "system": "s"},
        chat(Message("system", "s"), Message("user", "h"), Message("assistant", "i"), U, A),
    ),
    "alpaca in two languages": (
        "alpaca",
        {
            "en_instruction": "x",
            "en_input": "",
            "en_output": "y",
            "zh_instruction": "q",
            "zh_input": "",
            "zh_output": "a",
        },
        chat(U, A),
    ),
    "seed task": ("seed_tasks", {"instruction": "q", "instances": [{"input": "", "output": "a"}]}, chat(U, A)),
    "sharegpt": ("conversations", {"conversations": TALK}, chat(U, A)),
    "sharegpt with system and tools": (
        "conversations",
        {"conversations": TALK, "system": "s", "tools": json.dumps([SCHEMA])},
        chat(Message("system", "s"), U, A, tools=(json.dumps(SCHEMA),)),
    ),
    "sharegpt with calls": (
        "conversations",
        {
            "conversations": [
                TALK[0],
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "1"},
                TALK[1],
            ]
        },
        chat(U, CALLED, Message("tool", "1"), A),
    ),
    "messages": ("conversations", {"messages": MESSAGES}, chat(U, A)),
    "messages with typed parts": (
        "conversations",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}],
                },
            ]
        },
        chat(U, A._replace(reasoning="hm")),
    ),
    "messages with calls": (
        "conversations",
        {
            "messages": [
                MESSAGES[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "find", "arguments": json.dumps(CALL["arguments"])}}
                    ],
                },
                {"role": "tool", "content": "1"},
                MESSAGES[1],
            ]
        },
        chat(
            U,
            CALLED._replace(calls=json.dumps([{**CALL, "text": json.dumps(CALL["arguments"])}])),
            Message("tool", "1"),
            A,
        ),
    ),
    "messages with ids and names": (
        "conversations",
        {
            "messages": [
                {**MESSAGES[0], "name": "Ann"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "one", "type": "function", "function": CALL},
                        {"id": "two", "type": "function", "function": CALL},
                    ],
                },
                {"role": "tool", "tool_call_id": "two", "content": "2"},
                {"role": "tool", "tool_call_id": "one", "name": "find", "content": "1"},
                MESSAGES[1],
            ]
        },
        chat(
            U._replace(name="Ann"),
            Message("assistant", "", json.dumps([CALL, CALL]), call_id="one\ntwo"),
            Message("tool", "2", name="find", call_id="two"),  # the name of the tool that the id's call asked
            Message("tool", "1", name="find", call_id="one"),
            A,
        ),
    ),
    "messages as a table's cell has them": ("conversations", {"messages": json.dumps(MESSAGES)}, chat(U, A)),
    "messages as Python prints them": ("conversations", {"messages": repr(MESSAGES)}, chat(U, A)),
    "a prompt of messages in a table's cell": (
        "prompt_reply",
        {"prompt": json.dumps(MESSAGES[:1]), "completion": "a"},
        chat(U, A),
    ),
    "roles in other spellings": (
        "conversations",
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "bot", "value": "a"}]},
        chat(U, A),
    ),
    "messages with weights": (
        "conversations",
        {"messages": [*MESSAGES, MESSAGES[0], {**MESSAGES[1], "weight": 1}, MESSAGES[0], {**MESSAGES[1], "weight": 0}]},
        chat(U, A, U, A, U, A._replace(learn=False)),
    ),
    "prompt and response": ("prompt_reply", {"prompt": "q", "response": "a"}, chat(U, A)),
    "question and answer": ("prompt_reply", {"question": "q", "answer": "a"}, chat(U, A)),
    "input and output": ("prompt_reply", {"ID": 0, "Label": 2, "input": "q", "output": "a"}, chat(U, A)),
    "prompt and text": ("prompt_text", {"prompt": "q", "text": "a"}, chat(U, A)),
    "prompt and text that begins with it": ("prompt_text", {"prompt": "q", "text": "q a"}, chat(U, A)),
    "prompt and completion as messages": (
        "prompt_reply",
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        chat(U, A),
    ),
    "choices": (
        "choices",
        {"query": "q", "choices": ["x", "y"], "gold": 1},
        chat(Message("user", "q\nA. x\nB. y"), Message("assistant", "B")),
    ),
    "an exam": (
        "choices",
        {"Question": "q", "A": "x", "B": "y", "Answer": "A"},
        chat(Message("user", "q\nA. x\nB. y"), Message("assistant", "A")),
    ),
    "an exam without answers": (
        "choices",
        {"question": "q", "A": "x", "B": "y", "answer": ""},
        chat(Message("user", "q\nA. x\nB. y")),
    ),
    "a cloze question": (
        "choices",
        {"passage": "p", "question": "q", "options": None, "label": None, "answer": "2"},
        chat(Message("user", "p\nq"), Message("assistant", "2")),
    ),
    "preference": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, pair()),
    "preference after a conversation": (
        "preference",
        {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "b"}},
        pair(),
    ),
    "preference as messages": (
        "preference",
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "b"}]},
        pair(),
    ),
    "preference with its prompt twice": (
        "preference",
        {
            "prompt": "q",
            "chosen": MESSAGES,
            "rejected": [MESSAGES[0], {"role": "assistant", "content": "b"}],
        },
        pair(),
    ),
    "preference as whole conversations": (
        "preference",
        {"chosen_messages": MESSAGES, "rejected_messages": [MESSAGES[0], {"role": "assistant", "content": "b"}]},
        pair(),
    ),
    "preference as transcripts": (
        "preference",
        {
            "chosen": "\n\nHuman: h\n\nAssistant: i\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: h\n\nAssistant: i\n\nHuman: q\n\nAssistant: b",
        },
        pair(prompt=(Message("user", "h"), Message("assistant", "i"), U)),
    ),
    "preference as alpaca": (
        "preference",
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
        pair(prompt=(Message("user", "q\nx"),)),
    ),
    "two ranked replies": ("ranked", {"instruction": "q", "input": "", "output": ["a", "b"]}, pair()),
    "scored replies": (
        "ranked",
        {"prompt": "q", "responses": [{"text": "b", "score": 1}, {"text": "a", "score": 2}]},
        pair(),
    ),
    "replies with ranks": ("ranked", {"prompt": "q", "responses": ["b", "a"], "ranks": [2, 1]}, pair()),
    "labelled messages": (
        "labelled",
        {"messages": MESSAGES, "label": False},
        LabelledReply(**HERE, prompt=(U,), reply="a", label=False),
    ),
    "labelled completion": (
        "labelled",
        {"prompt": "q", "completion": "a", "label": True},
        LabelledReply(**HERE, prompt=(U,), reply="a", label=True),
    ),
    "labelled completion of a table": (
        "labelled",
        {"prompt": "q", "completion": "a", "label": "False"},
        LabelledReply(**HERE, prompt=(U,), reply="a", label=False),
    ),
    "preference beside the whole conversation": (
        "preference",
        {
            "prompt": "q",
            "messages": MESSAGES,
            "chosen": MESSAGES,
            "rejected": [MESSAGES[0], {"role": "assistant", "content": "b"}],
        },
        pair(),
    ),
    "preference with a system prompt": (
        "preference",
        {"system_prompt": "s", "question": "q", "chosen": "a", "rejected": "b"},
        pair(prompt=(Message("system", "s"), U)),
    ),
    "instruction with context": (
        "prompt_reply",
        {"instruction": "q", "context": "c", "response": "a"},
        chat(Message("user", "q\nc"), A),
    ),
    "text": ("text", {"text": "t"}, TextExample(**HERE, text="t")),
    "pair": ("pair", {"input": "q", "target": "a"}, SeqPair(**HERE, input="q", target="a")),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_row_is_understood_by_its_keys(name: str) -> None:
    form, row, meant = UNDERSTOOD[name]
    assert detect(row, AT.place) == form
    assert read(row) == [meant]


def test_every_format_is_understood_somewhere() -> None:
    assert {form for form, _, _ in UNDERSTOOD.values()} == set(FORMATS)


def test_a_ranking_is_every_pair_of_it() -> None:
    found = read({"prompt": "q", "responses": ["a", "b", "c"]})
    assert found == [
        pair("a", "b", id="s-1.1-2"),
        pair("a", "c", id="s-1.1-3"),
        pair("b", "c", id="s-1.2-3"),
    ]
    assert len(read({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 1, 2]})) == 2  # equals rank nothing


def test_columns_can_be_named() -> None:
    row = {"Tweet text": "q", "text_label": "a", "ID": 3}
    assert read(row, {"prompt": "Tweet text", "reply": "text_label"}) == [chat(U, A)]
    assert read({"good": "a", "bad": "b", "q": "q"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}) == [pair()]
    with pytest.raises(BadData, match='has no column "tweet"'):
        read(row, {"prompt": "tweet", "reply": "text_label"})


MALFORMED: dict[str, tuple[Any, str]] = {
    "null row": (None, "is not an object"),
    "number": (5, "is not an object"),
    "no fields": ({}, "is of no known format"),
    "unknown fields": ({"mesages": []}, "is of no known format"),
    "token ids": ({"input_ids": [1, 2], "labels": [1]}, "holds token ids"),
    "pictures by name": ({"conversations": TALK, "image": "x.jpg"}, "holds pictures or sound"),
    "label that is neither": ({"prompt": "q", "completion": "a", "label": "maybe"}, "is not true or false"),
    "labelled call": (
        {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [CALL]}], "label": True},
        "labels a reply that calls a tool",
    ),
    "history beside messages": ({"messages": MESSAGES, "history": [["a", "b"]]}, 'both messages and "history"'),
    "calls of nothing": ({"conversations": [TALK[0], {"from": "function_call", "value": "[]"}]}, "calls nothing"),
    "too many choices": ({"query": "q", "choices": ["x"] * 30, "gold": 1}, "has no list of choices"),
    "answer as a digit": ({"query": "q", "choices": ["x", "y"], "gold": "1"}, "which choice is right"),
    "prompt said twice and differently": (
        {"prompt": "other", "chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "b"}]},
        "what its replies begin with differ",
    ),
    "pictures": ({"messages": MESSAGES, "images": ["a.png"]}, "holds pictures or sound"),
    "output is a number": ({"instruction": "q", "output": 5}, 'field "output" is not text'),
    "output is null": ({"instruction": "q", "output": None}, 'field "output" is not text'),
    "half a character": ({"instruction": "q", "output": "\ud800"}, "half a character"),
    "history of one": ({"instruction": "q", "output": "a", "history": [["h"]]}, "is not a pair of texts"),
    "no instances": ({"instruction": "q", "instances": []}, '"instances" holds no turns'),
    "no turns": ({"conversations": []}, '"conversations" holds no turns'),
    "turns are text": ({"messages": "hello"}, '"messages" holds no turns'),
    "null turn": ({"messages": [MESSAGES[0], None]}, "is not a turn"),
    "null content": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]},
        'field "content" is not text',
    ),
    "no role": ({"messages": [{"content": "x"}]}, 'field "role" is not text'),
    "unknown role": ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role"),
    "reasoning of the user": ({"messages": [{**MESSAGES[0], "reasoning": "hm"}]}, "reasoning in a turn of the user"),
    "reasoning after text": (
        {
            "messages": [
                MESSAGES[0],
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}],
                },
            ]
        },
        "reasoning after text",
    ),
    "calls of one id": (
        {
            "messages": [
                MESSAGES[0],
                {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}, {"id": "1", "function": CALL}]},
            ]
        },
        "some have no id of their own",
    ),
    "a cell that is cut": ({"messages": json.dumps(MESSAGES)[:-5]}, "is not valid JSON"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is no text"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'field "text" is not text'),
    "weight between": ({"messages": [{**MESSAGES[1], "weight": 0.5}]}, 'has a "weight" between'),
    "mark that is a word": ({"messages": [{**MESSAGES[1], "train": "later"}]}, 'has a "train" between'),
    "marks at odds": (
        {"messages": [{**MESSAGES[1], "train": True, "weight": 0}]},
        "marks of training that are at odds",
    ),
    "mark of unknown name": ({"messages": [{**MESSAGES[1], "train_detail": [1]}]}, "what may be a mark of training"),
    "mark in camel case": ({"messages": [{**MESSAGES[1], "lossScale": 0.0}]}, "what may be a mark of training"),
    "two thoughts": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "thinking": "a", "reasoning": "b"}]},
        "has reasoning that is not one text",
    ),
    "thought that is no text": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning": {"effort": 1}}]},
        "has reasoning that is not one text",
    ),
    "result without call": ({"messages": [MESSAGES[0], {"role": "tool", "content": "1"}]}, "no call asked for"),
    "call that is no JSON": (
        {"conversations": [TALK[0], {"from": "function_call", "value": "{"}]},
        "is not valid JSON",
    ),
    "call without name": ({"conversations": [TALK[0], {"from": "function_call", "value": "{}"}]}, "names no tool"),
    "tools that are no JSON": ({"messages": MESSAGES, "tools": "[{"}, "tools is not valid JSON"),
    "tools that are a number": ({"messages": MESSAGES, "tools": 3}, '"tools" is not a list'),
    "rejected missing": ({"prompt": "q", "chosen": "a"}, '"rejected" is missing'),
    "chosen missing": ({"chosen_messages": MESSAGES}, '"rejected_messages" is missing'),
    "text and messages": ({"prompt": "q", "chosen": "a", "rejected": MESSAGES}, "chosen is text and rejected is"),
    "two prompts": (
        {"chosen": MESSAGES, "rejected": [{"role": "user", "content": "other"}, MESSAGES[1]]},
        "different prompts",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "has no prompt"),
    "reply by the user": ({"chosen": MESSAGES[:1], "rejected": MESSAGES[:1]}, "has no prompt"),
    "score is text": ({"prompt": "q", "responses": ["a", "b"], "scores": ["x", 1]}, "a score is not a number"),
    "score is NaN": ({"prompt": "q", "responses": ["a", "b"], "scores": [float("nan"), 1]}, "a score is not a number"),
    "one score": ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "not as many scores as replies"),
    "one reply": ({"prompt": "q", "responses": ["a"]}, "ranks no reply above another"),
    "label of a text": ({"text": "t", "label": True}, "labels a row of the format text"),
    "label without a reply": ({"messages": MESSAGES[:1], "label": True}, "does not end with the reply"),
    "choice that is not there": ({"query": "q", "choices": ["x"], "gold": 4}, "a choice that is not there"),
    "choices that are a text": ({"query": "q", "choices": "x", "gold": 0}, "has no list of choices"),
    "answer that is an object": ({"query": "q", "choices": ["x"], "gold": {}}, "which choice is right"),
}


MARKS = [
    *((key, value) for key in ("weight", "loss_weight", "loss_mask", "loss") for value in (0, 0.0, False, "false")),
    *((key, False) for key in ("train", "training", "trainable", "train_on_turn", "learn", "supervised", "has_loss")),
    *((key, True) for key in ("mask", "masked", "ignore", "skip_loss", "no_train")),
    ("mask", 1),
]


@pytest.mark.parametrize(("key", "value"), MARKS)
def test_a_turn_that_is_marked_as_not_to_be_trained_on_is_not(key: str, value: object) -> None:
    opposite: object = not value if isinstance(value, bool) else {0: 1, 1: 0, "false": "True"}[value]
    turns = [MESSAGES[0], {**MESSAGES[1], key: value}, MESSAGES[0], {**MESSAGES[1], key: opposite}]
    (found,) = parse({"messages": turns}, "conversations", Origin("1", "s", "p", 1))
    assert isinstance(found, ChatExample)
    assert [message.learn for message in found.messages] == [True, False, True, True]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_is_kept_whatever_it_is_called(key: str) -> None:
    for turn in ({**MESSAGES[1], key: "hm"}, {**MESSAGES[1], key: "hm", "weight": None}):
        (found,) = parse({"messages": [MESSAGES[0], turn]}, "conversations", Origin("1", "s", "p", 1))
        assert isinstance(found, ChatExample)
        assert found.messages[1] == Message("assistant", "a", reasoning="hm")


def test_reasoning_of_a_pairs_replies_is_written_into_them() -> None:
    replies = [{"role": "assistant", "content": text, "reasoning": "hm"} for text in ("a", "b")]
    (found,) = read({"prompt": "q", "chosen": replies[:1], "rejected": replies[1:]})
    assert isinstance(found, PreferencePair)
    assert (found.chosen, found.rejected) == ("<think>\nhm\n</think>\n\na", "<think>\nhm\n</think>\n\nb")


def test_what_is_not_read_of_a_turn_and_how_it_was_taken_is_said() -> None:
    said = Counter[str]()
    turns = [{**MESSAGES[0], "timestamp": "noon", "refusal": None}, {**MESSAGES[1], "role": "AI", "timestamp": "one"}]
    with collected(said):
        read({"messages": json.dumps(turns)})
    assert said == {
        '"timestamp" of a turn is not read': 2,
        'the role "AI" is taken as assistant': 1,
        '"messages" is a list that was written as text': 1,
    }


@pytest.mark.parametrize("name", MALFORMED)
def test_a_row_that_cannot_be_kept_whole_is_refused(name: str) -> None:
    row, what = MALFORMED[name]
    with pytest.raises(BadData) as caught:
        read(row)
    assert what in caught.value.what
    assert "f.jsonl:1" in caught.value.where
