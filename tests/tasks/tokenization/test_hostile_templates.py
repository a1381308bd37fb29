from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadData, BadModel
from tasks.core.limited_process import LIMITS, WORKER, Limits
from tasks.core.records import Message
from tasks.tokenization.chat_template import Chat, chat_text, load_tokenizer, render_chats, texts_of_chats
from tasks.tokenization.template_worker import chat_renderer

PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GOOD = Chat([Message("user", "hi"), Message("assistant", "ho")])
BAD = Chat([Message("user", "bad"), Message("assistant", "ho")])

HOSTILE = {
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ [1] * 10**10 }}",
    "text of the row": "{{ messages[0].content * 10**10 }}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ ('x' + messages[0].content).ljust(10**10) }}",
    "the filter center": "{{ 'a' | center(10**10) }}",
    "the filter indent": "{{ 'a\n' | indent(10**10, true) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "the filter replace": "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "join": "{{ ('b' * 10**5).join('a' * 10**5) }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "doubling of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a long range": "{{ range(10**9) | list }}",
    "a range summed": "{{ range(10**9) | sum }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a wide format": "{{ '%01000000000000d' | format(1) }}",
    "a wide %": "{{ '%5000000000d' % 1 }}",
    "a wide str.format": "{{ '{:>5000000000}'.format('x') }}",
    "a macro in itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two macros": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a power": "{{ (messages | length + 7) ** (9 ** 9) }}",
    "a number as text": "{{ (messages | length + 5) ** 9000 }}",
    "a growing namespace": "{% set n = namespace(x=[]) %}{% for i in range(10**9) %}{% set n.x = [n.x] %}{% endfor %}",
    "tojson of much": "{{ ([[messages[0].content * 1000] * 1000] * 1000) | tojson }}",
    "word wrap": "{{ ((messages[0].content ~ ' ') * 10**7) | wordwrap(2) }}",
    "the alphabet": "{{ lipsum(n=10**7) }}",
    "much text of many loops": "{% for i in range(10**6) %}{{ 'a' * 1000 }}{% endfor %}",
}


def if_bad(template: str) -> str:
    return "{% if messages[0].content == 'bad' %}" + template + "{% endif %}" + PLAIN


@pytest.fixture
def limits(small_limits: None) -> None:
    """The small ones."""


@pytest.mark.parametrize("template", HOSTILE.values(), ids=list(HOSTILE))
def test_a_row_for_which_a_template_takes_too_much_is_refused_and_the_next_one_renders(
    template: str, pico_base: Path, limits: None
) -> None:
    tokenizer: Any = load_tokenizer(pico_base)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = if_bad(template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, bad, last = render_chats(tokenizer, [GOOD, BAD, GOOD])
    tokenizer.chat_template = PLAIN
    assert [first] == [last] == render_chats(tokenizer, [GOOD])
    assert isinstance(bad, BadData)
    assert "the chat template" in bad.what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10  # KiB


def test_a_template_that_is_compiled_without_end_is_refused(pico_base: Path, limits: None) -> None:
    tokenizer: Any = load_tokenizer(pico_base)
    for template in ("{{ 'a' * 10**10 }}" + PLAIN, "{{ " + "(" * 50_000 + " }}", "{{ 9 ** (9 ** 9) }}" + PLAIN):
        tokenizer.chat_template = template
        assert all(isinstance(each, BadData) for each in texts_of_chats(tokenizer, [GOOD, GOOD]))
    tokenizer.chat_template = PLAIN
    assert texts_of_chats(tokenizer, [GOOD]) == [["user:hi<|im_end|>assistant:", "ho<|im_end|>"]]


def test_a_file_of_rows_that_all_take_too_long_ends(pico_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = load_tokenizer(pico_base)
    tokenizer.chat_template = if_bad(HOSTILE["nested loops"])
    monkeypatch.setattr(WORKER, "limits", Limits(row_s=0.1, lost_s=0.3))
    monkeypatch.setattr(WORKER, "_lost", type(WORKER._lost)())
    WORKER.close()
    with pytest.raises(BadModel, match="takes more time or memory than it may") as caught:
        render_chats(tokenizer, [BAD] * 1000)
    assert caught.value.where == f"{pico_base}: its chat template"
    WORKER.close()


def test_the_limits_are_two_seconds_and_half_a_gibibyte() -> None:
    assert Limits(2.0, 30.0, 512 << 20) == LIMITS == WORKER.limits


TEMPLATES = [
    PLAIN,
    "{%- for m in messages -%}\n  {% if loop.first %}{{ bos_token }}{% endif %}{{ m['content'] | trim }}\n{% endfor %}",
    "a{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{{ dict(a=1).items() | list }}{{ messages[0].keys() | list }}{{ messages[0].get('nope') }}{{ messages[0].nope }}",
    "{{ messages[0].content.upper() }}{{ messages[0].items }}",
    "{{ raise_exception('no ' ~ messages[0].role) }}",
    "{{ messages[0].__class__ }}{{ messages[0].pop('role') }}",
    "{{ namespace(_x=1) }}",
    "{{ messages[9].role }}{{ nothing.at.all }}",
    "{{ dict.fromkeys('ab') }}{{ strftime_now('%%') }}",
    "{{ messages[0]['content'][::-1] }}{{ '{0.content}'.format(messages[0]) }}",
    "{% for %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_and_errors_are_those_of_transformers(template: str) -> None:
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils as theirs

    messages = [{"role": "user", "content": " héllo <b>\n"}, {"role": "assistant", "content": "ok"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    given = {"add_generation_prompt": False, "bos_token": "<s>"}

    def expected(*, marked: bool) -> Any:
        try:
            compiled = theirs._compile_jinja_template(template)
            if marked:
                return theirs._render_with_assistant_indices(compiled, messages, tools, None, False, bos_token="<s>")
            return compiled.render(messages=messages, tools=tools, documents=None, **given)
        except (TemplateError, LookupError, TypeError) as error:
            return type(error), str(error)

    def found(*, marked: bool) -> Any:
        try:
            return chat_renderer((template, given, marked))((messages, tools))
        except (TemplateError, LookupError, TypeError) as error:
            return type(error), str(error)

    for marked in (False, True):
        assert found(marked=marked) == expected(marked=marked)


def test_a_message_that_is_continued_ends_where_transformers_ends_it(pico_base: Path) -> None:
    tokenizer: Any = load_tokenizer(pico_base)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer is "}]
    for template in (PLAIN, PLAIN.replace("m.content", "m.content | trim")):
        tokenizer.chat_template = template
        theirs = tokenizer.apply_chat_template(talk, tokenize=False, continue_final_message=True)
        assert chat_text(tokenizer, talk, answering=False) == theirs
        asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
        assert chat_text(tokenizer, talk[:1], answering=True) == asked
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(BadData, match="to be continued"):
        chat_text(tokenizer, talk, answering=False)
