from __future__ import annotations

import json
from copy import deepcopy
from random import Random

import pytest
from transformers import PreTrainedTokenizerBase

from flows.serve.tool_calls import FORMS, CallForm, CallReader, calls_in, tools_of

QWEN = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HERMES, MISTRAL, LLAMA = FORMS


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    found = deepcopy(tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        (QWEN.replace("<tool_call>", "[TOOL_CALLS] [").replace("</tool_call>", "]"), MISTRAL),
        (QWEN.replace("<tool_call>\n", "").replace("\n</tool_call>", "").replace('"arguments"', '"parameters"'), LLAMA),
        (QWEN.replace("tool_call>", "call>"), None),
    ],
)
def test_a_template_shows_how_it_writes_calls(
    tokenizer: PreTrainedTokenizerBase, template: str, form: CallForm | None
) -> None:
    found = tools_of(with_template(tokenizer, template))
    assert (found.reads, found.form) == (True, form)


def test_a_template_without_tools_is_known_for_that(tokenizer: PreTrainedTokenizerBase) -> None:
    found = tools_of(tokenizer)
    assert (found.reads, found.form) == (False, None)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"x": {"y": 1}}}\n</tool_call>\n'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": {"y": 1}}}]'),
        (LLAMA, '{"name": "f", "parameters": {"x": {"y": 1}}}'),
    ],
)
def test_calls_are_read_whatever_the_pieces_are(form: CallForm, text: str, random: Random) -> None:
    for _ in range(20):
        reader, said, rest = CallReader(form), "", "Well. " + text
        while rest:
            size = random.randrange(1, 9)
            said += reader.add(rest[:size])
            rest = rest[size:]
        held, (call,) = reader.end()
        assert said + held == "Well. "
        assert (call["type"], call["function"]["name"]) == ("function", "f")
        assert json.loads(call["function"]["arguments"]) == {"x": {"y": 1}}


def test_several_calls_are_told_apart() -> None:
    one = '<tool_call>{"name": "f", "arguments": {"n": %d}}</tool_call>'
    calls = calls_in(one % 1 + "\n" + one % 2, HERMES)
    assert [json.loads(call["function"]["arguments"])["n"] for call in calls] == [1, 2]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "text", ["<tool_call>{'name': 1}</tool_call>", '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"']
)
def test_what_is_no_call_stays_text(text: str) -> None:
    reader = CallReader(HERMES)
    said = reader.add(text)
    assert reader.end() == (text.removeprefix(said), [])


def test_without_tools_everything_is_text() -> None:
    reader = CallReader(None)
    assert reader.add("<tool_call>") == "<tool_call>"
    assert reader.end() == ("", [])
