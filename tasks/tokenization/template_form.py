"""What a chat template reads of a turn beside its role and its text, found by trying it on a made-up chat.

Templates agree on little here: some take the arguments of a call as an object and some as text, some demand ids of nine
letters, some read the assistant's reasoning under one of four names and some not at all. What a template does with a
conversation that was made for the question says more than its source does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from tasks.core.errors import BadData, BadModel
from tasks.core.records import Message, calls_with_ids, tool_call, written_out

DAY = "2025-01-01"
"""The date that templates write unless params say another."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
"""Under which name a template may read a turn's reasoning."""

_NAME, _KEY, _VALUE, _RESULT, _THOUGHT = "qxzvtool", "qxzvkey", "qxzvvalue", "qxzvresult", "qxzvthought"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _NAME,
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": _KEY}}},
    },
}

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Any] | None], str]
"""Renders messages with the schemas of tools; raises BadData where the template refuses them."""


class TemplateForm(NamedTuple):
    """What a chat template reads of a turn.

    Attributes:
        reasoning: the name under which it reads the assistant's reasoning; empty for one that does not, for which it is
            written into the text.
        text_arguments: whether it puts a call's arguments into its text as they are, so that they must be text.
        reads_ids: whether it writes the ids of calls, or the names of the tools beside results, or refuses turns
            without: those that have none are given them.
    """

    reasoning: str = ""
    text_arguments: bool = False
    reads_ids: bool = False


_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


def dated(template: str, day: str) -> str:
    """Return a chat template that writes a day's date where it would write that of the day on which it is used.

    Raises:
        BadModel: it would write another date or something at random, so that no two renderings need be the same.
    """
    written = _TODAY.sub(lambda found: repr(date.fromisoformat(day).strftime(found[2])), template)
    if found := re.search(r"\bstrftime_now\s*\(.{0,40}|\|\s*random\b", written):
        raise BadModel(
            "its chat template writes what is not in the row",
            got=found[0],
            expected="a date of a format that stands in it, such as strftime_now('%d %b %Y')",
            fix="put the text itself there",
        )
    return written


def find_reasoning(render: Render) -> str:
    """Return the name under which a template reads a turn's reasoning; empty for none."""
    for key in REASONING_KEYS:
        turns = [{"role": "user", "content": "qxzv"}, {"role": "assistant", "content": "qxzv", key: _THOUGHT}]
        if _THOUGHT in _tried(render, turns, None):
            return key
    return ""


def find_calls(render: Render) -> tuple[bool, bool]:
    """Return whether a template needs a call's arguments as text, and whether it reads ids."""
    turns = [
        Message("user", "qxzv"),
        Message("assistant", "", json.dumps([{"name": _NAME, "arguments": {_KEY: _VALUE}}])),
        Message("tool", _RESULT),
        Message("assistant", "qxzv"),
    ]
    for text_arguments in (False, True):
        without, with_ids = (
            _tried(render, as_template_input(turns, TemplateForm("", text_arguments, each)), [_TOOL])
            for each in (False, True)
        )
        # not as Python prints an object, and not as text inside of text
        if _NAME in with_ids and _VALUE in with_ids and not re.search(rf"\{{'{_KEY}'|\\\"{_KEY}", with_ids):
            return text_arguments, without != with_ids
    return False, False


def _tried(render: Render, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
    try:
        return render(turns, tools)
    except BadData:
        return ""


def as_template_input(messages: Sequence[Message], form: TemplateForm) -> list[Mapping[str, Any]]:
    """Convert messages to what a template of a form is given."""
    made = 0
    waiting: list[tuple[str, str]] = []
    result: list[Mapping[str, Any]] = []
    for message in messages:
        role, content, calls_text, _, reasoning, name, call_id = message
        plain: dict[str, Any] = {"role": role, "content": content}
        if not (calls_text or reasoning or name or call_id or waiting):  # as nearly all are
            result.append(plain)
            continue
        if message.reasoning and form.reasoning:
            plain[form.reasoning] = message.reasoning
        elif message.reasoning:
            plain["content"] = written_out(message)
        if message.calls:
            calls = calls_with_ids(message)
            if form.reads_ids and not call_id:  # nine letters and digits suit every template that looks at them
                calls = [(f"call{made + number:05}", call) for number, (_, call) in enumerate(calls, start=1)]
            made += len(calls)
            waiting = [(each, call["name"]) for each, call in calls]
            plain["tool_calls"] = [tool_call(each, call["name"], _arguments(call, form)) for each, call in calls]
        elif message.role == "tool" and form.reads_ids and waiting:  # results come in the order of their calls
            asked = next((each for each in waiting if each[0] == call_id), waiting[0])
            waiting.remove(asked)
            call_id, name = call_id or asked[0], name or asked[1]
        if call_id and not message.calls:
            plain["tool_call_id"] = call_id
        if name:
            plain["name"] = name
        result.append(plain)
    return result


def _arguments(call: Mapping[str, Any], form: TemplateForm) -> Any:
    if form.text_arguments:
        return call.get("text") or json.dumps(call["arguments"], ensure_ascii=False)
    return call["arguments"]


def reasoning_kept(messages: Sequence[Message], keep: str) -> Sequence[Message]:
    """Leave out reasoning: of all turns (`drop`), of all but the assistant's last one (`last_turn_only`), or of none.

    Served models are given no reasoning of earlier turns, which is why their templates leave it out.
    """
    if keep == "keep" or not any(message.reasoning for message in messages):
        return messages
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    kept = places[-1:] if keep == "last_turn_only" else []
    return [m if place in kept else m._replace(reasoning="") for place, m in enumerate(messages)]
