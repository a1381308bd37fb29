"""From a row as people write it to a row of ours: every common form of chats, preferences, labels, pairs and texts.

`detect` tells the format by a row's keys; `FORMATS` has a function for each. All of them are pure, and refuse what they
cannot keep whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from tasks.errors import BadData
from tasks.records import ChatExample, LabelledReply, Message, PreferencePair, Record, SeqPair, TextExample

Row = Mapping[str, Any]


class Origin(NamedTuple):
    """Where a row came from: its id, the key of `ingest.sources`, the file, and the number there."""

    id: str
    source: str
    file: str
    row: int

    @property
    def place(self) -> str:
        """`file:row`, for errors."""
        return f"{self.file}:{self.row}"


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
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""What roles are called, and what they are."""

_CALLING = ("function_call", "tool_call")
_THOUGHT = "<think>\n{}\n</think>\n\n"
"""How a turn of reasoning before the answer is written: as Qwen3 and DeepSeek-R1 have it in their templates."""


def parse(row: Any, form: str | Mapping[str, str], origin: Origin) -> Sequence[Record]:
    """What one row of a file says.

    Args:
        row: what the file holds there.
        form: a key of `FORMATS`, or a mapping of our fields (prompt, reply, system, chosen, rejected, label, text,
            input, target) onto the file's columns.
        origin: where it came from.

    Returns:
        One record; several for a row that ranks or lists more than two replies.

    Raises:
        BadData: the row is not of that format, or holds what would be lost.
    """
    _check_object(row, origin.place)
    if any(row.get(key) for key in ("image", "images", "audio", "audios", "video", "videos")):
        raise BadData("holds pictures or sound, which temper does not train on", where=origin.place)
    if isinstance(form, Mapping):
        row, form = _renamed(row, form, origin.place)
    return FORMATS[form](row, origin)


def detect(row: Any, place: str) -> str:
    """The format of a row, by its keys.

    Raises:
        BadData: no format has such keys.
    """
    _check_object(row, place)
    for form, is_it in _SIGNS.items():
        if is_it(row):
            return form
    if "input_ids" in row:
        raise BadData(
            "holds token ids; temper renders texts itself", where=place, fix="give the rows before they were tokenised"
        )
    raise BadData(
        "is of no known format",
        where=place,
        got=f"the fields {', '.join(map(str, row)) or '(none)'}"[:300],
        expected=", ".join(FORMATS),
        fix="say in the source's `format` which column is what, such as {prompt: Question, reply: Answer}",
    )


def _check_object(row: Any, place: str) -> None:
    if not isinstance(row, Mapping):
        got = "null" if row is None else type(row).__name__
        raise BadData("is not an object", where=place, got=got, expected="an object with named fields")


# --- chats ------------------------------------------------------------------------------------------------------------


def parse_alpaca(row: Row, origin: Origin) -> Sequence[Record]:
    """`instruction`, `output`, and perhaps `input`, `system`, `history` (a list of [question, answer])."""
    place, prefix = origin.place, _language(row)
    instruction = _text(row, f"{prefix}instruction", place)
    context = _text(row, f"{prefix}input", place) if row.get(f"{prefix}input") is not None else ""
    before = [*_system(row, place), *_history(row, place)]
    question = Message("user", f"{instruction}\n{context}" if context else instruction)
    reply = Message("assistant", _text(row, f"{prefix}output", place))
    return [_chat(origin, [*before, question, reply], row)]


def parse_seed_tasks(row: Row, origin: Origin) -> Sequence[Record]:
    """`instruction` and `instances`, a list of {input, output} (arXiv:2212.10560)."""
    instances = _list(row, "instances", origin.place)
    rows: list[Record] = []
    for number, instance in enumerate(instances):
        inner = origin if len(instances) == 1 else origin._replace(id=f"{origin.id}.{number + 1}")
        rows += parse_alpaca({"instruction": row.get("instruction"), **_mapping(instance, origin.place)}, inner)
    return rows


def parse_conversations(row: Row, origin: Origin) -> Sequence[Record]:
    """`conversations` or `messages`: a list of turns {from, value} or {role, content}; perhaps `system`, `tools`."""
    key = next((k for k in ("messages", "conversations", "conversation") if k in row), "messages")
    if row.get("history"):
        raise BadData('has both messages and "history"', where=origin.place, fix="put all turns into one list")
    return [_chat(origin, [*_system(row, origin.place), *_turns(row, key, origin.place)], row)]


def parse_prompt_reply(row: Row, origin: Origin) -> Sequence[Record]:
    """One question and its answer, under one of the pairs of names in `PROMPT_REPLY`; perhaps `system`, `history`."""
    place = origin.place
    asked, answered = next((pair for pair in PROMPT_REPLY if pair[0] in row and pair[1] in row), ("prompt", "reply"))
    before = [*_system(row, place), *_history(row, place)]
    prompt = _prompt(row, asked, place)
    for name in ("context", "input"):
        if name != asked and row.get(name):
            if len(prompt) != 1:
                raise BadData(
                    f'has both messages and "{name}"', where=place, fix="put all of the prompt into one place"
                )
            prompt = [prompt[0]._replace(content=f"{prompt[0].content}\n{_text(row, name, place)}")]
    reply = row.get(answered)
    replies = (
        _turns(row, answered, place) if isinstance(reply, list) else [Message("assistant", _text(row, answered, place))]
    )
    return [_chat(origin, [*before, *prompt, *replies], row)]


PROMPT_REPLY = (
    ("prompt", "reply"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("context", "continuation"),
    ("context", "answer"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("prompt", "canonical_solution"),
    ("input", "output"),
)


def parse_choices(row: Row, origin: Origin) -> Sequence[Record]:
    """A multiple-choice question: `question` or `query`, `choices`, `options` or columns A, B, ..., and which is right.

    A question of a test without answers becomes a chat without a reply, which is good to look for leaks with.
    """
    place, row = origin.place, {str(key).lower() if len(str(key)) > 1 else key: value for key, value in row.items()}
    asked = _text(row, "question" if "question" in row else "query", place)
    passage = row.get("passage")
    options = row.get("choices", row.get("options"))
    if options is None:
        options = [row[letter] for letter in LETTERS if isinstance(row.get(letter), str)]
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise BadData("has no list of choices", where=place, got=repr(options)[:60], expected="a list of texts")
    lines = [f"{passage}\n{asked}" if isinstance(passage, str) and passage else asked]
    lines += [o if re.match(r"\(?[A-Z][).]", o) else f"{LETTERS[i]}. {o}" for i, o in enumerate(map(str, options))]
    answer = next((row[k] for k in ("gold", "label", "answer") if row.get(k) not in (None, "", [])), None)
    reply = [] if answer is None else [Message("assistant", _choice(answer, len(options), place))]
    return [_chat(origin, [Message("user", "\n".join(lines)), *reply], row)]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _choice(answer: Any, options: int, place: str) -> str:
    """Which choice is right, as its letter; for a question without choices, the answer itself."""
    if isinstance(answer, bool) or not isinstance(answer, (int, str, list)):
        raise BadData("does not say which choice is right", where=place, got=repr(answer), expected="a letter or index")
    if isinstance(answer, int):
        if not 0 <= answer < options:
            raise BadData(
                "names a choice that is not there", where=place, got=str(answer), expected=f"0 to {options - 1}"
            )
        return LETTERS[answer]
    text = "".join(map(str, answer)) if isinstance(answer, list) else answer
    if options and text.strip().isdigit():
        raise BadData(
            "does not say which choice is right", where=place, got=repr(text), expected="a letter, or a number"
        )
    return text


# --- preferences and labels -------------------------------------------------------------------------------------------


def parse_preference(row: Row, origin: Origin) -> Sequence[Record]:
    """`chosen` and `rejected` after a shared prompt.

    The prompt is `prompt`, `conversations`, `messages`, `question` or `instruction` with `input`; or what both lists of
    messages, or both `Human: ... Assistant: ...` transcripts, begin with.
    """
    place = origin.place
    names = ("chosen_messages", "rejected_messages") if "chosen_messages" in row else ("chosen", "rejected")
    for name in names:
        if row.get(name) is None:
            raise BadData(f'"{name}" is missing', where=place, expected="two replies to one prompt")
    first, second = (_whole_reply(row, name, place) for name in names)
    if isinstance(row[names[0]], str) != isinstance(row[names[1]], str):
        raise BadData("chosen is text and rejected is messages, or the reverse", where=place, fix="use one form")
    stated = [*_system(row, place), *_history(row, place), *_stated_prompt(row, place)]
    prompts = [reply[:-1] for reply in (first, second)]
    shared = _shared(stated, prompts[0], first, place)
    if prompts[0] != prompts[1]:
        raise BadData("chosen and rejected answer different prompts", where=place, fix="give both the same prompt")
    if not shared:
        raise BadData("has no prompt", where=place, got=f"the fields {', '.join(row)}", expected="prompt, or messages")
    for reply in (first[-1], second[-1]):
        if reply.role != "assistant" or reply.calls:
            raise BadData(
                "a reply must be one turn of text by the assistant", where=place, got=f"a turn of {reply.role}"
            )
    return [_preference(origin, shared, first[-1].content, second[-1].content, row)]


def _shared(stated: list[Message], before: list[Message], chosen: list[Message], place: str) -> list[Message]:
    """The prompt, which may stand beside the replies, before them, or in both places."""
    if stated == chosen:  # the whole conversation with the better reply, as UltraFeedback has it
        return before
    if not before or stated[len(stated) - len(before) :] == before:
        return stated
    if stated and any(message.role != "system" for message in stated):
        raise BadData("its prompt and what its replies begin with differ", where=place, fix="give both the same prompt")
    return [*stated, *before]


def parse_ranked(row: Row, origin: Origin) -> Sequence[Record]:
    """Replies in order, best first (`output` or `responses` as a list), or with `scores` or `ranks`: all pairs."""
    place = origin.place
    key = next(k for k in ("responses", "answers", "outputs", "output") if isinstance(row.get(k), list))
    replies = [item if isinstance(item, str) else _mapping(item, place) for item in row[key]]
    texts = [r if isinstance(r, str) else _text(r, "text" if "text" in r else "content", place) for r in replies]
    scores = _scores(row, replies, place)
    prompt = [*_system(row, place), *_history(row, place), *_stated_prompt(row, place)]
    if not prompt:
        raise BadData("has no prompt", where=place, expected="prompt, question or instruction")
    pairs = []
    for one, other in combinations(range(len(texts)), 2):
        better, worse = (one, other) if scores[one] >= scores[other] else (other, one)
        if scores[better] > scores[worse]:
            single = len(texts) == 2
            inner = origin if single else origin._replace(id=f"{origin.id}.{better + 1}-{worse + 1}")
            pairs.append(_preference(inner, prompt, texts[better], texts[worse], row))
    if not pairs:
        raise BadData("ranks no reply above another", where=place, got=f"{len(texts)} replies", expected="two or more")
    return pairs


def _scores(row: Row, replies: Sequence[Any], place: str) -> list[float]:
    """How good each reply is: higher is better."""
    given: list[Any] = [r.get("score", r.get("rank")) if isinstance(r, Mapping) else None for r in replies]
    lower_is_better = any(isinstance(r, Mapping) and "rank" in r for r in replies)
    for key in ("scores", "ranks", "rank"):
        if isinstance(row.get(key), list):
            given, lower_is_better = list(row[key]), key != "scores"
    if all(value is None for value in given):
        return [-float(index) for index in range(len(replies))]
    if len(given) != len(replies):
        raise BadData("has not as many scores as replies", where=place, got=f"{len(given)} and {len(replies)}")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise BadData("a score is not a number", where=place, got=repr(value), expected="a number for each reply")
    return [-float(value) if lower_is_better else float(value) for value in given]


def parse_labelled(row: Row, origin: Origin) -> Sequence[Record]:
    """A conversation or a prompt with one reply, and `label` or `kto_tag`: whether the reply is good."""
    place = origin.place
    label = _truth(row["kto_tag"] if "kto_tag" in row else row.get("label"), place)
    plain = {k: v for k, v in row.items() if k not in ("label", "kto_tag")}
    form = detect(plain, place)
    if form not in ("conversations", "prompt_reply", "alpaca"):
        raise BadData(f"labels a row of the format {form}", where=place, expected="a chat, or a prompt and a reply")
    (chat,) = FORMATS[form](plain, origin)
    if not isinstance(chat, ChatExample) or len(chat.messages) < 2 or chat.messages[-1].role != "assistant":
        raise BadData("does not end with the reply that is labelled", where=place, expected="an assistant's turn last")
    *prompt, reply = chat.messages
    if reply.calls:
        raise BadData("labels a reply that calls a tool", where=place, expected="a reply of text")
    return [LabelledReply(**origin._asdict(), prompt=tuple(prompt), reply=reply.content, label=label, tools=chat.tools)]


def _truth(label: Any, place: str) -> bool:
    """A label as people write it: true or false, 1 or 0, also as text, for tables have nothing else."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(label, (bool, int, str)) and str(label).strip().lower() in known:
        return known[str(label).strip().lower()]
    raise BadData('"label" is not true or false', where=place, got=repr(label), expected="true for a good reply")


# --- texts and pairs --------------------------------------------------------------------------------------------------


def parse_text(row: Row, origin: Origin) -> Sequence[Record]:
    """`text` or `content`."""
    return [TextExample(**origin._asdict(), text=_text(row, "text" if "text" in row else "content", origin.place))]


def parse_pair(row: Row, origin: Origin) -> Sequence[Record]:
    """An input and its target, under one of the pairs of names in `INPUT_TARGET`."""
    given, wanted = next((pair for pair in INPUT_TARGET if pair[0] in row and pair[1] in row), INPUT_TARGET[0])
    place = origin.place
    return [SeqPair(**origin._asdict(), input=_text(row, given, place), target=_text(row, wanted, place))]


INPUT_TARGET = (("input", "target"), ("inputs", "targets"), ("source", "target"), ("document", "summary"))

FORMATS: Mapping[str, Callable[[Row, Origin], Sequence[Record]]] = {
    "conversations": parse_conversations,
    "alpaca": parse_alpaca,
    "seed_tasks": parse_seed_tasks,
    "prompt_reply": parse_prompt_reply,
    "choices": parse_choices,
    "preference": parse_preference,
    "ranked": parse_ranked,
    "labelled": parse_labelled,
    "text": parse_text,
    "pair": parse_pair,
}


def _has_label(row: Row) -> bool:
    """Whether a reply is labelled good or bad; a `label` of other tables, such as a class, stands without a reply."""
    if "kto_tag" in row or isinstance(row.get("label"), bool):
        return True
    replies = ("completion", "reply", "response")
    return "label" in row and "prompt" in row and any(key in row for key in replies)


def _has_prompt(row: Row) -> bool:
    return any(key in row for key in ("prompt", "question", "query", "instruction"))


_SIGNS: Mapping[str, Callable[[Row], bool]] = {
    "preference": lambda row: "chosen" in row or "chosen_messages" in row,
    "labelled": _has_label,
    "ranked": lambda row: (
        _has_prompt(row)
        and any(isinstance(row.get(key), list) for key in ("responses", "answers", "outputs", "output"))
    ),
    "conversations": lambda row: any(key in row for key in ("messages", "conversations", "conversation")),
    "seed_tasks": lambda row: "instruction" in row and "instances" in row,
    "alpaca": lambda row: f"{_language(row)}instruction" in row and f"{_language(row)}output" in row,
    "choices": lambda row: (
        any(key in row for key in ("question", "query", "Question"))
        and ("choices" in row or "options" in row or ("A" in row and "B" in row))
    ),
    "prompt_reply": lambda row: any(pair[0] in row and pair[1] in row for pair in PROMPT_REPLY),
    "pair": lambda row: any(pair[0] in row and pair[1] in row for pair in INPUT_TARGET),
    "text": lambda row: isinstance(row.get("text"), str) or set(row) == {"content"},
}
"""How each format is told, in the order of asking; other columns are not read."""


# --- parts ------------------------------------------------------------------------------------------------------------


def _renamed(row: Row, columns: Mapping[str, str], place: str) -> tuple[Row, str]:
    """The row under our names, and the format that has those."""
    renamed = {}
    for field, column in columns.items():
        if column not in row:
            raise BadData(f'has no column "{column}"', where=place, got=f"the columns {', '.join(map(str, row))}"[:300])
        renamed[field] = row[column]
    return renamed, detect(renamed, place)


def _chat(origin: Origin, messages: Sequence[Message], row: Row) -> ChatExample:
    _check_tools(messages, origin.place)
    return ChatExample(**origin._asdict(), messages=tuple(messages), tools=_tools(row, origin.place))


def _preference(origin: Origin, prompt: Sequence[Message], chosen: str, rejected: str, row: Row) -> PreferencePair:
    _check_tools(prompt, origin.place)
    tools = _tools(row, origin.place)
    return PreferencePair(**origin._asdict(), prompt=tuple(prompt), chosen=chosen, rejected=rejected, tools=tools)


def _language(row: Row) -> str:
    """The prefix of the columns of a file with every row in several languages: the one that is not English."""
    if "instruction" in row:
        return ""
    prefixes = [str(key)[: -len("instruction")] for key in row if str(key).endswith("_instruction")]
    return next((prefix for prefix in prefixes if prefix != "en_"), prefixes[0] if prefixes else "")


def _system(row: Row, place: str) -> list[Message]:
    key = "system" if "system" in row else "system_prompt"
    return [Message("system", _text(row, key, place))] if row.get(key) else []


def _history(row: Row, place: str) -> list[Message]:
    """Earlier turns: `history`, a list of [question, answer]."""
    turns = []
    for number, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            where = f"{place} history[{number}]"
            raise BadData("is not a pair of texts", where=where, got=repr(pair)[:60], expected="[question, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _stated_prompt(row: Row, place: str) -> list[Message]:
    """The prompt that stands beside the replies."""
    for key in ("prompt", "question", "query"):
        if key in row:
            return _prompt(row, key, place)
    for key in ("conversations", "messages"):
        if key in row:
            return _turns(row, key, place)
    if "instruction" in row:
        context = _text(row, "input", place) if row.get("input") else ""
        instruction = _text(row, "instruction", place)
        return [Message("user", f"{instruction}\n{context}" if context else instruction)]
    return []


def _prompt(row: Row, key: str, place: str) -> list[Message]:
    """A prompt as text, as a transcript, or as a list of messages."""
    if isinstance(row.get(key), list):
        return _turns(row, key, place)
    text = _text(row, key, place)
    return (
        _transcript(text.removesuffix("\n\nAssistant:")) if text.startswith("\n\nHuman:") else [Message("user", text)]
    )


def _whole_reply(row: Row, key: str, place: str) -> list[Message]:
    """A reply as messages: the last one is the reply itself, those before it are its prompt."""
    value = row[key]
    if isinstance(value, str):
        return _transcript(value) if value.startswith("\n\nHuman:") else [Message("assistant", _text(row, key, place))]
    if isinstance(value, Mapping):
        return [_turn(value, f"{place} {key}")]
    return _turns(row, key, place)


def _transcript(text: str) -> list[Message]:
    """Paragraphs that begin with `Human:` and `Assistant:` as messages (the form of hh-rlhf, arXiv:2204.05862)."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _turns(row: Row, key: str, place: str) -> list[Message]:
    return [_turn(turn, f"{place} {key}[{number}]") for number, turn in enumerate(_list(row, key, place))]


def _turn(turn: Any, where: str) -> Message:
    """One turn, {from, value} or {role, content}, perhaps with tool_calls, weight or loss_weight."""
    if not isinstance(turn, Mapping):
        got = "null" if turn is None else repr(turn)[:60]
        raise BadData("is not a turn", where=where, got=got, expected="{from, value} or {role, content}")
    speaker, said = ("from", "value") if "from" in turn else ("role", "content")
    name = _text(turn, speaker, where)
    if name not in ROLES:
        raise BadData(
            "has an unknown role", where=where, got=repr(name), expected=", ".join(sorted(set(ROLES.values())))
        )
    weight = turn.get("weight", turn.get("loss_weight", 1))
    if weight not in (0, 1, None):
        raise BadData("has a weight between", where=where, got=repr(weight), expected="0 or 1")
    learn = weight != 0 or ROLES[name] != "assistant"
    if name in _CALLING:
        return Message("assistant", "", _calls([turn.get(said)], where), learn)
    given = turn.get("tool_calls") or []
    calls = [given] if isinstance(given, (str, dict)) else list(given)
    if turn.get("function_call"):
        calls.append(turn["function_call"])
    content = turn.get(said)
    if isinstance(content, list):
        text, inner = _content_parts(content, where)
        calls += inner
    elif content is None and calls:
        text = ""
    else:
        text = _text(turn, said, where)
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        text = _THOUGHT.format(reasoning) + text
    return Message(ROLES[name], text, _calls(calls, where) if calls else "", learn)


def _content_parts(parts: Sequence[Any], where: str) -> tuple[str, list[Any]]:
    """Typed parts: texts joined, reasoning before them in its tags, tool calls apart."""
    texts, calls = [], []
    for number, part in enumerate(parts):
        inner = f"{where}.content[{number}]"
        part = {"type": "text", "text": part} if isinstance(part, str) else _mapping(part, inner)
        kind, key = part.get("type"), "value" if "value" in part else "text"
        if kind == "text":
            texts.append(_text(part, key, inner))
        elif kind == "reasoning":
            texts.append(_THOUGHT.format(_text(part, key, inner)))
        elif kind in ("tool_call", "function"):
            calls.append(part.get("value", part))
        else:
            raise BadData("is no text", where=inner, got=repr(kind), expected="text, reasoning or tool_call")
    return "".join(texts), calls


def _calls(calls: Sequence[Any], where: str) -> str:
    """Tool calls as one JSON list of {name, arguments}, whatever they were wrapped in."""
    found: list[dict[str, Any]] = []
    for call in calls:
        value = _json(call, where, "a tool call") if isinstance(call, str) else call
        for each in value if isinstance(value, list) else [value]:
            inner = _mapping(each, where)
            inner = _mapping(inner.get("function", inner), where)
            arguments = inner.get("arguments", inner.get("parameters", {}))
            if not isinstance(inner.get("name"), str):
                raise BadData("a tool call names no tool", where=where, got=repr(dict(inner))[:80])
            if isinstance(arguments, str):
                arguments = _json(arguments or "{}", where, "the arguments of a tool call")
            found.append({"name": inner["name"], "arguments": arguments})
    if not found:
        raise BadData("a tool call calls nothing", where=where, expected="{name, arguments}")
    return json.dumps(found, ensure_ascii=False)


def _tools(row: Row, place: str) -> tuple[str, ...]:
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


def _check_tools(messages: Sequence[Message], place: str) -> None:
    """A tool's result must follow the call that asked for it."""
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


def _list(row: Row, key: str, place: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise BadData(
            f'"{key}" holds no turns', where=place, got=repr(value)[:60], expected="a list with something in it"
        )
    return value


def _mapping(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise BadData("is not an object", where=where, got=repr(value)[:60], expected="an object with named fields")
    return value


def _text(row: Row, field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        got = "nothing" if field not in row else "null" if value is None else type(value).__name__
        raise BadData(f'field "{field}" is not text', where=place, got=got, expected="a string")
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
