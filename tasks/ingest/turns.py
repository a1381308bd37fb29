"""Turns out of the fields of a row: messages, histories, transcripts, calls and tools, whatever they are called."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.core.errors import BadData
from tasks.core.records import Message, calls_with_ids
from tasks.ingest.remarks import NotRead, remark

RawRow = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""What roles are called, in small letters, and what they are."""

_CALLING = ("function_call", "tool_call")

_TRAINED = (
    "weight",
    "loss_weight",
    "loss_mask",
    "loss",
    "compute_loss",
    "has_loss",
    "train",
    "training",
    "trainable",
    "train_on",
    "train_on_turn",
    "should_train",
    "learn",
    "learnable",
    "supervised",
)
"""What a turn's mark is called that is true, or 1, where the turn is trained on."""

_NOT_TRAINED = ("mask", "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "skip_loss", "no_train")
"""What it is called where true says that the turn is not trained on."""

_LIKE_A_MARK = re.compile(
    r"(?:^|[^a-z])(?:(?:un)?train(?:ed|ing|able)?|loss(?:es)?|(?:un)?mask(?:ed|ing)?|weight(?:s|ed|ing)?"
    r"|learn(?:ed|t|ing|able)?|(?:un)?supervised)(?:[^a-z]|$)"
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

_YES_NO = dict.fromkeys(("true", "yes", "1", "1.0"), True) | dict.fromkeys(("false", "no", "0", "0.0"), False)

_REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
"""What a turn's reasoning before its answer is called."""

_READ = frozenset(
    ("from", "value", "role", "content", "name", "tool_calls", "function_call", "tool_call_id", "type")
) | {*_TRAINED, *_NOT_TRAINED, *_REASONING}
"""All keys of a turn that are read."""


def system_of(row: RawRow, place: str) -> list[Message]:
    """Parse the system turn, if the row has one apart from its turns."""
    key = "system" if "system" in row else "system_prompt"
    return [Message("system", text_of(row, key, place))] if row.get(key) else []


def history_of(row: RawRow, place: str) -> list[Message]:
    """Earlier turns: `history`, a list of [question, answer]."""
    turns = []
    for number, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            where = f"{place} history[{number}]"
            raise BadData("is not a pair of texts", where=where, got=repr(pair)[:60], expected="[question, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def stated_prompt_of(row: RawRow, place: str) -> list[Message]:
    """Parse the prompt that stands beside the replies."""
    for key in ("prompt", "question", "query"):
        if key in row:
            return prompt_of(row, key, place)
    for key in ("conversations", "messages"):
        if key in row:
            return turns_of(row, key, place)
    if "instruction" in row:
        context = text_of(row, "input", place) if row.get("input") else ""
        instruction = text_of(row, "instruction", place)
        return [Message("user", f"{instruction}\n{context}" if context else instruction)]
    return []


def prompt_of(row: RawRow, key: str, place: str) -> list[Message]:
    """Parse a prompt given as text, as a transcript, or as a list of messages."""
    if isinstance(row.get(key), list) or _is_list_of_turns(row.get(key)):
        return turns_of(row, key, place)
    text = text_of(row, key, place)
    return (
        _transcript(text.removesuffix("\n\nAssistant:")) if text.startswith("\n\nHuman:") else [Message("user", text)]
    )


def reply_of(row: RawRow, key: str, place: str) -> list[Message]:
    """Parse a reply as messages: the last one is the reply itself, those before it are its prompt."""
    value = row[key]
    if isinstance(value, str) and not _is_list_of_turns(value):
        return (
            _transcript(value) if value.startswith("\n\nHuman:") else [Message("assistant", text_of(row, key, place))]
        )
    if isinstance(value, Mapping):
        return [_turn(value, f"{place} {key}")]
    return turns_of(row, key, place)


def _transcript(text: str) -> list[Message]:
    """Parse paragraphs that begin with `Human:` and `Assistant:` (the form of hh-rlhf, arXiv:2204.05862)."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def turns_of(row: RawRow, key: str, place: str) -> list[Message]:
    """Parse the messages of a field that lists them."""
    turns = [_turn(turn, f"{place} {key}[{number}]") for number, turn in enumerate(list_of(row, key, place))]
    return _with_names(turns)


def _turn(turn: Any, where: str) -> Message:
    """Parse one turn, {from, value} or {role, content}, perhaps with tool_calls, reasoning, or a mark of training."""
    if not isinstance(turn, Mapping):
        got = "null" if turn is None else repr(turn)[:60]
        raise BadData("is not a turn", where=where, got=got, expected="{from, value} or {role, content}")
    speaker, said = ("from", "value") if "from" in turn else ("role", "content")
    given = text_of(turn, speaker, where)
    name = given if given in ROLES else given.strip().lower()
    if name not in ROLES:
        raise BadData(
            "has an unknown role", where=where, got=repr(given), expected=", ".join(sorted(set(ROLES.values())))
        )
    if name != given:
        remark(f'the role "{given}" is taken as {ROLES[name]}')
    if not turn.keys() <= _READ:
        for key in sorted(str(key) for key in turn.keys() - _READ if turn[key] not in (None, "", [], {})):
            remark(NotRead(f'"{key}" of a turn is not read'))
    role, learn = ROLES[name], _is_trained(turn, where) or ROLES[name] != "assistant"
    if name in _CALLING:
        return _calling(Message("assistant", "", learn=learn), [turn.get(said)], where)
    asked = turn.get("tool_calls") or []
    calls = [asked] if isinstance(asked, (str, Mapping)) else list(asked)
    if turn.get("function_call"):
        calls.append(turn["function_call"])
    content = turn.get(said)
    thoughts = [turn[key] for key in _REASONING if turn.get(key)]
    if isinstance(content, list):
        text, inner, thought = _content_parts(content, where)
        calls += inner
        thoughts += [thought] if thought else []
    elif content is None and (calls or thoughts):
        text = ""
    else:
        text = text_of(turn, said, where)
    if any(not isinstance(thought, str) for thought in thoughts) or len(set(thoughts)) > 1:
        got = ", ".join(repr(thought)[:40] for thought in thoughts)
        raise BadData("has reasoning that is not one text", where=where, got=got, expected="one text")
    if thoughts and role != "assistant":
        raise BadData(f"has reasoning in a turn of the {role}", where=where, expected="reasoning of the assistant")
    speaks = {key: _label(turn, key, where) for key in ("name", "tool_call_id")}
    reasoning = str(thoughts[0]) if thoughts else ""
    message = Message(role, text, "", learn, reasoning, speaks["name"], speaks["tool_call_id"])
    return _calling(message, calls, where) if calls else message


def _label(turn: Mapping[str, Any], key: str, where: str) -> str:
    """Return a name or an id, which is text or a number; nothing for none."""
    value = turn.get(key)
    if value is None or isinstance(value, (str, int)):
        return "" if value is None else str(value)
    raise BadData(f'has a "{key}" that is no name', where=where, got=repr(value)[:60], expected="text")


def _with_names(turns: list[Message]) -> list[Message]:
    """Give results of tools that name the id of a call, and no tool, the name of the tool that was called."""
    made: dict[str, str] = {}
    named = []
    for turn in turns:
        if turn.calls and turn.call_id:
            made |= {call_id: call["name"] for call_id, call in calls_with_ids(turn)}
        elif turn.role == "tool" and not turn.name and turn.call_id in made:
            turn = turn._replace(name=made[turn.call_id])
        named.append(turn)
    return named


def _is_trained(turn: Mapping[str, Any], where: str) -> bool:
    """Return whether a turn's marks, under whatever name, let it be trained on; a turn without any is.

    Raises:
        BadData: marks are not of a kind that is known, or at odds: a turn would be trained on that should not be.
    """
    marks: dict[str, bool] = {}
    for key, value in turn.items():
        if key in (*_TRAINED, *_NOT_TRAINED):
            if value is not None:
                marks[key] = _yes_or_no(key, value, where) is (key in _TRAINED)
        elif _LIKE_A_MARK.search(_CAMEL.sub("_", str(key)).lower()) and value not in (None, "", [], {}):
            raise BadData(
                "has what may be a mark of training under a name that is not known",
                where=where,
                got=f"{key}: {value!r}"[:80],
                expected=f"one of {', '.join((*_TRAINED, *_NOT_TRAINED))}",
                fix="rename it, or remove it",
            )
    if len(set(marks.values())) > 1:
        got = ", ".join(f"{key}: {turn[key]!r}" for key in marks)
        raise BadData("has marks of training that are at odds", where=where, got=got)
    return all(marks.values())


def _yes_or_no(key: str, value: Any, where: str) -> bool:
    found = _YES_NO.get(str(value).strip().lower())
    if found is None:
        raise BadData(f'has a "{key}" between', where=where, got=repr(value)[:60], expected="0 or 1, true or false")
    return found


def _content_parts(parts: Sequence[Any], where: str) -> tuple[str, list[Any], str]:
    """Typed parts: texts joined, tool calls, and reasoning, which must stand before the text."""
    texts, calls, thoughts = list[str](), list[Any](), list[str]()
    for number, part in enumerate(parts):
        inner = f"{where}.content[{number}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else mapping_of(part, inner)
        kind, key = part.get("type"), "value" if "value" in part else "text"
        if kind == "text":
            texts.append(text_of(part, key, inner))
        elif kind in ("reasoning", "thinking"):
            if any(text.strip() for text in texts):
                raise BadData("is reasoning after text", where=inner, expected="reasoning before the answer")
            thoughts.append(text_of(part, str(kind) if kind in part else key, inner))
        elif kind in ("tool_call", "function"):
            calls.append(part.get("value", part))
        else:
            raise BadData("is no text", where=inner, got=repr(kind), expected="text, reasoning or tool_call")
    return "".join(texts), calls, "\n\n".join(thoughts)


def _calling(message: Message, calls: Sequence[Any], where: str) -> Message:
    """Return the turn with its tool calls, whatever they were wrapped in."""
    found, ids = list[dict[str, Any]](), list[str]()
    for call in calls:
        value = _json(call, where, "a tool call") if isinstance(call, str) else call
        for each in value if isinstance(value, list) else [value]:
            outer = mapping_of(each, where)
            inner = mapping_of(outer.get("function", outer), where)
            arguments = inner.get("arguments", inner.get("parameters", {}))
            if not isinstance(inner.get("name"), str):
                raise BadData("a tool call names no tool", where=where, got=repr(dict(inner))[:80])
            text = {}
            if isinstance(arguments, str):
                text = {"text": arguments}
                arguments = _json(arguments or "{}", where, "the arguments of a tool call")
            found.append({"name": inner["name"], "arguments": arguments, **text})
            ids.append(_label(outer, "id", where))
    if not found:
        raise BadData("a tool call calls nothing", where=where, expected="{name, arguments}")
    if any(ids) and (not all(ids) or len(set(ids)) < len(ids) or any("\n" in each for each in ids)):
        raise BadData("has calls of which some have no id of their own", where=where, got=repr(ids)[:80])
    return message._replace(calls=json.dumps(found, ensure_ascii=False), call_id="\n".join(ids) if any(ids) else "")


def tools_of(row: RawRow, place: str) -> tuple[str, ...]:
    """JSON schemas of the tools that a chat may use, each as text."""
    value = row.get("tools") or row.get("functions") or []
    if isinstance(value, str):
        value = _json(value, place, "tools") if value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadData('"tools" is not a list', where=place, got=type(value).__name__, expected="a list of JSON schemas")
    tools = [_json(tool, place, "a tool") if isinstance(tool, str) else tool for tool in value]
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)


def check_tools(messages: Sequence[Message], place: str) -> None:
    """Check that a tool's result follows the call that requested it."""
    called = False
    for number, message in enumerate(messages):
        if message.role == "tool" and not called:
            raise BadData(
                "has a tool's result that no call asked for",
                where=f"{place} turn {number + 1}",
                expected="an assistant's turn with a tool call before it",
            )
        called = bool(message.calls) or (called and message.role == "tool")


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{what} is not valid JSON", where=where, got=text[:80], fix="correct this row") from error


def list_of(row: RawRow, key: str, place: str) -> list[Any]:
    """Return a field after checking that it lists something."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):  # as a table's cell has it
        value = _cell(value, f"{place} {key}")
        remark(f'"{key}" is a list that was written as text')
    if not isinstance(value, list) or not value:
        raise BadData(
            f'"{key}" holds no turns', where=place, got=repr(value)[:60], expected="a list with something in it"
        )
    return value


def _is_list_of_turns(value: Any) -> bool:
    """Return whether a text is the list of turns that a table's cell can only hold as text."""
    return (
        isinstance(value, str)
        and re.match(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""", value) is not None
    )


def _cell(text: str, where: str) -> Any:
    """Parse a list out of the cell of a table: JSON, or what Python prints of one, as pandas writes it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadData("is not valid JSON", where=where, got=text[:80], fix="correct this row") from error


def mapping_of(value: Any, where: str) -> RawRow:
    """Return a value after checking that it is an object."""
    if not isinstance(value, Mapping):
        raise BadData("is not an object", where=where, got=repr(value)[:60], expected="an object with named fields")
    return value


def text_of(row: RawRow, field: str, place: str) -> str:
    """Return a field after checking that it is text which can be written in UTF-8."""
    value = row.get(field)
    if not isinstance(value, str):
        got = "nothing" if field not in row else "null" if value is None else type(value).__name__
        raise BadData(f'field "{field}" is not text', where=place, got=got, expected="a string")
    if "<img" in value:
        remark(f'"{field}" holds an <img> address, which is taken as words')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadData(
            f'field "{field}" holds half a character (a lone surrogate)',
            where=place,
            got=repr(value[error.start : error.end]),
            fix="write the file again in UTF-8",
        ) from error
    return value
