"""From a row of ours to the forms that other programs read; what a form cannot hold is refused, never dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.files.inspect import any_file
from tasks.core.artifacts import atomic_file
from tasks.core.errors import BadData, BadParams
from tasks.core.records import (
    ChatExample,
    LabelledReply,
    Message,
    PreferencePair,
    Record,
    calls_with_ids,
    tool_call,
)
from tasks.ingest.remarks import NotRead
from tasks.ingest.stage import Reading

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def as_messages(record: Record) -> Mapping[str, Any]:
    """Convert to OpenAI's form: `messages` of {role, content}, `tools`; or `prompt`, `chosen`, `rejected`; `label`."""
    if isinstance(record, ChatExample):
        return {"messages": [_message(m) for m in record.messages], **_tools(record.tools)}
    if isinstance(record, LabelledReply):
        messages = [*map(_message, record.prompt), {"role": "assistant", "content": record.reply}]
        return {"messages": messages, "label": record.label, **_tools(record.tools)}
    return as_preference(record)


def as_conversations(record: Record) -> Mapping[str, Any]:
    """Convert to ShareGPT's form: `conversations` of {from, value}, `tools`; pairs also `chosen` and `rejected`."""
    if isinstance(record, ChatExample):
        return {"conversations": _talk(record.messages, record), **_tools_text(record.tools)}
    if isinstance(record, PreferencePair):
        return {
            "conversations": _talk(record.prompt, record),
            "chosen": {"from": "gpt", "value": record.chosen},
            "rejected": {"from": "gpt", "value": record.rejected},
            **_tools_text(record.tools),
        }
    if isinstance(record, LabelledReply):
        talk = [*_talk(record.prompt, record), {"from": "gpt", "value": record.reply}]
        return {"conversations": talk, "label": record.label, **_tools_text(record.tools)}
    raise _refused(record, "conversations", f"a row of the kind {record.kind}")


def as_alpaca(record: Record) -> Mapping[str, Any]:
    """`instruction`, `input`, `output`; earlier turns as `history`, a system turn as `system`."""
    if not isinstance(record, ChatExample):
        raise _refused(record, "alpaca", f"a row of the kind {record.kind}")
    turns = list(record.messages)
    if record.tools or any(turn != Message(turn.role, turn.content) for turn in turns):
        raise _refused(record, "alpaca", "tools, reasoning, names, or turns of weight 0")
    system = {"system": turns.pop(0).content} if turns and turns[0].role == "system" else {}
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise _refused(record, "alpaca", f"turns of {', '.join(roles) or 'nobody'}")
    if "system" in system and not system["system"]:
        raise _refused(record, "alpaca", "an empty system turn")
    history = [[one.content, other.content] for one, other in zip(turns[:-2:2], turns[1:-2:2], strict=True)]
    row = {"instruction": turns[-2].content, "input": "", "output": turns[-1].content}
    return {**row, **system, **({"history": history} if history else {})}


def as_preference(record: Record) -> Mapping[str, Any]:
    """`prompt`, `chosen` and `rejected`, each a list of messages."""
    if not isinstance(record, PreferencePair):
        raise _refused(record, "preference", f"a row of the kind {record.kind}")
    replies = {name: [{"role": "assistant", "content": getattr(record, name)}] for name in ("chosen", "rejected")}
    return {"prompt": [_message(m) for m in record.prompt], **replies, **_tools(record.tools)}


CONVERSIONS: Mapping[str, Callable[[Record], Mapping[str, Any]]] = {
    "messages": as_messages,
    "conversations": as_conversations,
    "alpaca": as_alpaca,
    "preference": as_preference,
}


def _refused(record: Record, form: str, got: str) -> BadData:
    where = f"{record.file}:{record.row}" if record.file else record.id
    return BadData(f"cannot be written as {form} without losing something", where=where, got=got)


def _message(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.name:
        row["name"] = message.name
    if message.calls:
        row["tool_calls"] = [
            tool_call(call_id, call["name"], _given_arguments(call)) for call_id, call in calls_with_ids(message)
        ]
    elif message.call_id:
        row["tool_call_id"] = message.call_id
    return row if message.learn else {**row, "weight": 0}


def _given_arguments(call: Mapping[str, Any]) -> Any:
    return call.get("text", call["arguments"])


def _talk(messages: Sequence[Message], record: Record) -> list[dict[str, Any]]:
    talk: list[dict[str, Any]] = []
    for message in messages:
        if message.calls and message.content:
            raise _refused(record, "conversations", "a turn with both text and a tool call")
        if message.reasoning or message.name or message.call_id:
            raise _refused(record, "conversations", "a turn with reasoning, a name or the id of a call")
        if message.calls:
            calls = [{"name": call["name"], "arguments": _given_arguments(call)} for _, call in calls_with_ids(message)]
            turn = {
                "from": "function_call",
                "value": json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False),
            }
        else:
            turn = {"from": SPEAKERS[message.role], "value": message.content}
        talk.append(turn if message.learn else {**turn, "weight": 0})
    return talk


def _tools(tools: Sequence[str]) -> dict[str, Any]:
    return {"tools": [json.loads(tool) for tool in tools]} if tools else {}


def _tools_text(tools: Sequence[str]) -> dict[str, Any]:
    return {"tools": json.dumps([json.loads(tool) for tool in tools], ensure_ascii=False)} if tools else {}


def convert(source: Path, target: Path, form: str) -> int:
    """Write a file's rows in another form, as .json (an array) or .jsonl; return how many.

    Raises:
        BadData: a row cannot be read, or holds what the form cannot; then nothing was written.
        BadParams: the form or the file's ending is none that is known.
    """
    if form not in CONVERSIONS:
        raise BadParams("is no form to write", where=f"--to {form}", expected=", ".join(CONVERSIONS))
    if target.suffix not in (".json", ".jsonl"):
        raise BadParams("is no kind of file to write", where=str(target), expected="an ending of .json or .jsonl")
    if target.resolve() == source.resolve():
        raise BadParams("is the file that is read", where=str(target), fix="name another")
    count = 0
    with atomic_file(target) as file:
        array = target.suffix == ".json"
        reading = Reading("", any_file(source, max_refused=0.0))
        for record in reading.records():
            line = json.dumps(CONVERSIONS[form](record), ensure_ascii=False)
            file.write(((("[\n" if not count else ",\n") + line) if array else line + "\n").encode())
            count += 1
            if lost := [each for each in reading.remarks if isinstance(each, NotRead)]:
                raise _refused(record, form, "; ".join(lost))
        if array:
            file.write(b"\n]\n")
    return count
