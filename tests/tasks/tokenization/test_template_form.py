"""Templates that want the same conversation in different forms, each as some family of models has it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData, BadModel
from tasks.core.records import Message
from tasks.tokenization.chat_template import load_tokenizer, render_chat
from tasks.tokenization.template_form import dated, reasoning_kept

TURN = "<|im_start|>{{ m.role }}\n%s<|im_end|>\n"
ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = "{% if m.tool_calls %}{% for c in m.tool_calls %}%s{% endfor %}{% else %}{{ m.content }}{% endif %}"
WARMTH = json.dumps(
    {
        "type": "function",
        "function": {"name": "warmth", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
    }
)
CALL = {"name": "warmth", "arguments": {"town": "Oslo"}}
ASKED = Message("user", "How warm is it in Oslo?")
ANSWERED = Message("assistant", "4 degrees.")


def given(tokenizer: PreTrainedTokenizerBase, turn: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TOOLS + "{% for m in messages %}" + TURN % turn + "{% endfor %}" + ASKING
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerBase, *turns: Message) -> str:
    return str(tokenizer.decode(render_chat(tokenizer, turns, (WARMTH,)).ids))


@pytest.fixture
def own(pico_base: Path) -> PreTrainedTokenizerBase:
    """A tokenizer whose template a test may change."""
    return load_tokenizer(pico_base)


def conversation(call: Message, result: Message) -> list[Message]:
    return [ASKED, call, result, ANSWERED]


def calling(ids: str = "", **said: str) -> Message:
    return Message("assistant", "", json.dumps([{**CALL, **said}]), call_id=ids)


def test_arguments_are_given_as_the_template_joins_them(own: PreTrainedTokenizerBase) -> None:
    """An object where it is made JSON of, and its own text, or JSON, where it is put beside other text."""
    spaced = '{"town":  "Oslo"}'
    for turn, expected in (
        (CALLS.replace("%s", "{{ c.function | tojson }}"), '{"name": "warmth", "arguments": {"town": "Oslo"}}'),
        (CALLS.replace("%s", "{{ c.function.name + ' ' + c.function.arguments }}"), f"warmth {spaced}"),
        (CALLS.replace("%s", "{{ c.function.name }} {{ c.function.arguments }}"), f"warmth {spaced}"),
    ):
        text = text_of(given(own, turn), *conversation(calling(text=spaced), Message("tool", "4")))
        assert f"assistant\n{expected}<|im_end|>" in text
    assert 'warmth {"town": "Oslo"}<|im_end|>' in text_of(own, *conversation(calling(), Message("tool", "4")))


NINE = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id is not defined or c.id|length != 9 %}"
    "{{ raise_exception('an id has nine letters') }}{% endif %}{{ c.function | tojson }} {{ c.id }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.name }} {{ m.tool_call_id[:9] }}: {{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}"
)


def test_ids_are_made_where_a_template_demands_them(own: PreTrainedTokenizerBase) -> None:
    """By their order in the conversation, so that the same row has the same ones; a row's own are passed on."""
    two = Message("assistant", "", json.dumps([CALL, CALL]))
    text = text_of(given(own, NINE), ASKED, two, Message("tool", "4"), Message("tool", "5"), ANSWERED)
    assert "call00001" in text.split("tool\n")[0]
    assert "tool\nwarmth call00001: 4<|im_end|>" in text
    assert "tool\nwarmth call00002: 5<|im_end|>" in text
    text = text_of(own, *conversation(calling("123456789"), Message("tool", "4", call_id="123456789")))
    assert "tool\nwarmth 123456789: 4<|im_end|>" in text
    writes = (
        "{% if m.role == 'tool' %}{{ m.name }}: {{ m.content }}{% else %}"
        + CALLS.replace("%s", "{{ c.function | tojson }}{{ c.id }}")
        + "{% endif %}"
    )
    text = text_of(given(own, writes), *conversation(calling(), Message("tool", "4")))
    assert "}call00001<|im_end|>" in text
    assert "tool\nwarmth: 4<|im_end|>" in text
    given(own, NINE)
    with pytest.raises(BadData, match="refuses") as caught:
        text_of(own, *conversation(calling("short"), Message("tool", "4", call_id="short")))
    assert caught.value.got == "an id has nine letters"


@pytest.mark.parametrize("written", ["m.content | tojson", "m.content | e", "m.content | replace('\n', '\r\n')"])
def test_a_result_that_is_written_in_another_form_is_not_dropped(own: PreTrainedTokenizerBase, written: str) -> None:
    turn = (
        "{% if m.role == 'tool' %}{{ "
        + written
        + " }}{% else %}"
        + CALLS.replace("%s", "{{ c.function | tojson }}")
        + "{% endif %}"
    )
    result = Message("tool", '{"degrees": "4 < 5"}\nand no more')
    assert "degrees" in text_of(given(own, turn), *conversation(calling(), result))
    for cut in ("", "m.content[:12]", "m.content[-12:]"):
        with pytest.raises(BadData, match="drops the tool turn"):
            text_of(given(own, turn.replace(written, cut or "''")), *conversation(calling(), result))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_templates_that_read_it(own: PreTrainedTokenizerBase, key: str) -> None:
    turn = "{% if m." + key + " %}[{{ m." + key + " }}]{% endif %}{{ m.content }}"
    thought = ANSWERED._replace(reasoning="four")
    assert "assistant\n[four]4 degrees.<|im_end|>" in text_of(given(own, turn), ASKED, thought)
    plain = text_of(given(own, "{{ m.content }}"), ASKED, thought)
    assert "assistant\n<think>\nfour\n</think>\n\n4 degrees.<|im_end|>" in plain


def test_reasoning_is_kept_as_one_asks() -> None:
    thought = ANSWERED._replace(reasoning="four")
    turns = [ASKED, thought, ASKED, thought]
    assert reasoning_kept(turns, "keep") == turns
    assert reasoning_kept(turns, "drop") == [ASKED, ANSWERED, ASKED, ANSWERED]
    assert reasoning_kept(turns, "last_turn_only") == [ASKED, ANSWERED, ASKED, thought]


def test_a_template_writes_the_date_that_it_is_given() -> None:
    template = "{{ strftime_now('%d %b %Y') }} {% if strftime_now is defined %}{{ strftime_now( \"%Y\" ) }}{% endif %}"
    assert (
        dated(template, "2024-07-26") == "{{ '26 Jul 2024' }} {% if strftime_now is defined %}{{ '2024' }}{% endif %}"
    )
    assert dated("{{ messages }}", "2024-07-26") == "{{ messages }}"
    for moving in ("{{ strftime_now(format) }}", "{{ [1, 2] | random }}"):
        with pytest.raises(BadModel, match="what is not in the row"):
            dated(moving, "2024-07-26")


def test_a_dated_template_is_the_same_every_day(pico_base: Path, tmp_path: Path) -> None:
    """Also of a folder that no run has made; `base` writes its date into the folder, as which it is in the digest."""
    import shutil

    from tasks.base.params import LocalBase
    from tasks.base.stage import pin_date

    folder = tmp_path / "dated"
    shutil.copytree(pico_base, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}" + TURN % "{{ m.content }}" + "{% endfor %}" + ASKING
    )
    (default := LocalBase(kind="local", path=str(folder)).template_date)
    shown = date.fromisoformat(default).strftime("%d %b %Y")
    assert text_of_date(folder) == shown
    assert pin_date(folder, "1999-12-31")
    assert text_of_date(folder) == "31 Dec 1999"
    assert not pin_date(folder, "2000-01-01")


def text_of_date(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    return str(tokenizer.decode(render_chat(tokenizer, [ASKED, ANSWERED]).ids)).splitlines()[0]
