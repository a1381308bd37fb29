"""One function for each form that rows are written in; all are pure, and refuse what they cannot keep whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile
from typing import Any, NamedTuple

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, Message, PreferencePair, Record, SeqPair, TextExample, written_out
from tasks.ingest.remarks import remark
from tasks.ingest.turns import (
    RawRow,
    check_tools,
    history_of,
    list_of,
    mapping_of,
    prompt_of,
    reply_of,
    stated_prompt_of,
    system_of,
    text_of,
    tools_of,
    turns_of,
)
from tasks.readers.numbered_answers import number_of


class Origin(NamedTuple):
    """Origin of a row: its id, the key of `ingest.sources`, the file, and the number there."""

    id: str
    source: str
    file: str
    row: int

    @property
    def place(self) -> str:
        """`file:row`, for errors."""
        return f"{self.file}:{self.row}"


def parse_alpaca(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`instruction`, `output`, and perhaps `input`, `system`, `history` (a list of [question, answer])."""
    place, prefix = origin.place, language_of(row)
    instruction = text_of(row, f"{prefix}instruction", place)
    context = text_of(row, f"{prefix}input", place) if row.get(f"{prefix}input") is not None else ""
    before = [*system_of(row, place), *history_of(row, place)]
    question = Message("user", f"{instruction}\n{context}" if context else instruction)
    reply = Message("assistant", text_of(row, f"{prefix}output", place))
    return [_chat(origin, [*before, question, reply], row)]


def parse_seed_tasks(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`instruction` and `instances`, a list of {input, output} (arXiv:2212.10560)."""
    instances = list_of(row, "instances", origin.place)
    rows: list[Record] = []
    for number, instance in enumerate(instances):
        inner = origin if len(instances) == 1 else origin._replace(id=f"{origin.id}.{number + 1}")
        rows += parse_alpaca({"instruction": row.get("instruction"), **mapping_of(instance, origin.place)}, inner)
    return rows


def parse_conversations(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`conversations` or `messages`: a list of turns {from, value} or {role, content}; perhaps `system`, `tools`."""
    key = next((k for k in ("messages", "conversations", "conversation") if k in row), "messages")
    if row.get("history"):
        raise BadData('has both messages and "history"', where=origin.place, fix="put all turns into one list")
    return [_chat(origin, [*system_of(row, origin.place), *turns_of(row, key, origin.place)], row)]


def parse_prompt_reply(row: RawRow, origin: Origin) -> Sequence[Record]:
    """Parse a question and its answer, under one of the name pairs in `PROMPT_REPLY`; perhaps `system`, `history`."""
    place = origin.place
    asked, answered = next((pair for pair in PROMPT_REPLY if pair[0] in row and pair[1] in row), ("prompt", "reply"))
    before = [*system_of(row, place), *history_of(row, place)]
    prompt = prompt_of(row, asked, place)
    for name in ("context", "input"):
        if name != asked and row.get(name):
            if len(prompt) != 1:
                raise BadData(
                    f'has both messages and "{name}"', where=place, fix="put all of the prompt into one place"
                )
            prompt = [prompt[0]._replace(content=f"{prompt[0].content}\n{text_of(row, name, place)}")]
    reply = row.get(answered)
    replies = (
        turns_of(row, answered, place)
        if isinstance(reply, list)
        else [Message("assistant", text_of(row, answered, place))]
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


def parse_choices(row: RawRow, origin: Origin) -> Sequence[Record]:
    """Parse a multiple-choice question: `question` or `query`, `choices`, `options` or columns A, B, ..., the answer.

    A question of a test without answers becomes a chat without a reply, which is good to look for contamination with.
    """
    place = origin.place
    given = _small_keys(row)
    asked = text_of(given, "question" if "question" in given else "query", place)
    passage = given.get("passage")
    options, _, answer = choices_of(row)
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise BadData("has no list of choices", where=place, got=repr(options)[:60], expected="a list of texts")
    lines = [f"{passage}\n{asked}" if isinstance(passage, str) and passage else asked]
    lines += [o if re.match(r"\(?[A-Z][).]", o) else f"{LETTERS[i]}. {o}" for i, o in enumerate(map(str, options))]
    reply = [] if answer is None else [Message("assistant", _choice(answer, len(options), place))]
    return [_chat(origin, [Message("user", "\n".join(lines)), *reply], row)]


def _small_keys(row: RawRow) -> dict[str, Any]:
    return {str(key).lower() if len(str(key)) > 1 else key: value for key, value in row.items()}


_ANSWERS = ("gold", "label", "answer", "answerkey", "answer_key")


def choices_of(row: RawRow) -> tuple[Any, str, Any]:
    """Return the choices of a question, the key of its answer in small letters, and the answer, None for none.

    An answer is the letter of the choice where the choices have labels of their own, as ARC has on the hub.
    """
    row = _small_keys(row)
    options = row.get("choices", row.get("options"))
    if options is None:
        options = [row[each] for each in LETTERS if isinstance(row.get(each), str)]
        options = options or [row[each] for each in LETTERS.lower() if isinstance(row.get(each), str)]
    key = next((key for key in _ANSWERS if row.get(key) not in (None, "", [])), "")
    answer = row.get(key)
    if isinstance(options, Mapping) and isinstance(options.get("text"), list) and "label" in options:
        labels = [str(label) for label in options["label"]]
        options = options["text"]
        if str(answer) in labels:
            answer = LETTERS[labels.index(str(answer))]
    return options, key, answer


def lettered(row: RawRow, first: int, place: str) -> RawRow:
    """Return a question whose answer is the number of a choice with the letter of that instead.

    Raises:
        BadData: there is no such choice.
    """
    options, key, answer = choices_of(row)
    number = number_of(answer)
    if number is None or not isinstance(options, list) or str(answer).strip() in map(str, options):
        return row
    if not 0 <= number - first < len(options):
        expected = f"{first} to {first + len(options) - 1}"
        raise BadData("names a choice that is not there", where=place, got=str(answer), expected=expected)
    return {**{name: value for name, value in row.items() if str(name).lower() != key}, key: LETTERS[number - first]}


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _choice(answer: Any, options: int, place: str) -> str:
    """Return which choice is right, as its letter; for a question without choices, the answer itself."""
    if isinstance(answer, bool) or not isinstance(answer, (int, str, list)):
        raise BadData("does not say which choice is right", where=place, got=repr(answer), expected="a letter or index")
    if isinstance(answer, int):
        if not 0 <= answer < options:
            raise BadData(
                "names a choice that is not there", where=place, got=str(answer), expected=f"0 to {options - 1}"
            )
        return LETTERS[answer]
    text = "".join(map(str, answer)) if isinstance(answer, list) else answer
    if options and text.strip().isdecimal():
        raise BadData(
            "does not say which choice is right", where=place, got=repr(text), expected="a letter, or a number"
        )
    return text


def parse_preference(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`chosen` and `rejected` after a shared prompt.

    The prompt is `prompt`, `conversations`, `messages`, `question` or `instruction` with `input`; or what both lists of
    messages, or both `Human: ... Assistant: ...` transcripts, begin with.
    """
    place = origin.place
    names = ("chosen_messages", "rejected_messages") if "chosen_messages" in row else ("chosen", "rejected")
    for name in names:
        if row.get(name) is None:
            raise BadData(f'"{name}" is missing', where=place, expected="two replies to one prompt")
    first, second = (reply_of(row, name, place) for name in names)
    if isinstance(row[names[0]], str) != isinstance(row[names[1]], str):
        raise BadData("chosen is text and rejected is messages, or the reverse", where=place, fix="use one form")
    stated = [*system_of(row, place), *history_of(row, place), *stated_prompt_of(row, place)]
    prompts = [reply[:-1] for reply in (first, second)]
    shared = _shared(stated, prompts[0], first, place)
    if prompts[0] != prompts[1]:
        raise BadData("chosen and rejected answer different prompts", where=place, fix="give both the same prompt")
    if not shared and (begins := _common_beginning(first[-1].content, second[-1].content)):
        remark("what chosen and rejected begin with is taken as their prompt")
        shared = [Message("user", begins.strip())]
        first, second = (
            [reply[-1]._replace(content=reply[-1].content[len(begins) :].lstrip())] for reply in (first, second)
        )
    if not shared:
        raise BadData("has no prompt", where=place, got=f"the fields {', '.join(row)}", expected="prompt, or messages")
    for reply in (first[-1], second[-1]):
        if reply.role != "assistant" or reply.calls or reply.name:
            raise BadData(
                "a reply must be one turn of text by the assistant", where=place, got=f"a turn of {reply.role}"
            )
    return [_preference(origin, shared, written_out(first[-1]), written_out(second[-1]), row)]


_SENTENCES = re.compile(r".*(?:[.?!:](?=\s)|[。？！：])", re.DOTALL)  # the marks of Chinese


def _common_beginning(chosen: str, rejected: str) -> str:
    """Return what two texts begin with, up to the end of a line or a sentence; nothing if one has no more than that."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = chosen[: sum(1 for _ in same)]
    lines, end, _ = shared.rpartition("\n")
    sentences = _SENTENCES.match(shared)
    found = lines + end if lines.strip() else sentences[0] if sentences else ""
    return found if chosen[len(found) :].strip() and rejected[len(found) :].strip() else ""


def _shared(stated: list[Message], before: list[Message], chosen: list[Message], place: str) -> list[Message]:
    """Return the prompt, which may stand beside the replies, before them, or in both places."""
    if stated == chosen:  # the whole conversation with the better reply, as UltraFeedback has it
        return before
    if not before or stated[len(stated) - len(before) :] == before:
        return stated
    if stated and any(message.role != "system" for message in stated):
        raise BadData("its prompt and what its replies begin with differ", where=place, fix="give both the same prompt")
    return [*stated, *before]


def parse_ranked(row: RawRow, origin: Origin) -> Sequence[Record]:
    """Parse replies in order, best first (`output` or `responses` a list), or with `scores` or `ranks`: all pairs."""
    place = origin.place
    key = next(k for k in ("responses", "answers", "outputs", "output") if isinstance(row.get(k), list))
    replies = [item if isinstance(item, str) else mapping_of(item, place) for item in row[key]]
    texts = [r if isinstance(r, str) else text_of(r, "text" if "text" in r else "content", place) for r in replies]
    scores = _scores(row, replies, place)
    prompt = [*system_of(row, place), *history_of(row, place), *stated_prompt_of(row, place)]
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


def _scores(row: RawRow, replies: Sequence[Any], place: str) -> list[float]:
    """Return how good each reply is: higher is better."""
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


def parse_prompt_text(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`prompt` and `text`, which is the reply, or the prompt and the reply after it."""
    prompt, text = text_of(row, "prompt", origin.place), text_of(row, "text", origin.place)
    whole = bool(prompt) and text.startswith(prompt)
    remark(f'"text" beside "prompt" is taken as {"the prompt and its reply" if whole else "the reply"}')
    reply = text[len(prompt) :].strip() if whole else text
    return [_chat(origin, [Message("user", prompt), Message("assistant", reply)], row)]


def parse_text(row: RawRow, origin: Origin) -> Sequence[Record]:
    """`text` or `content`."""
    return [TextExample(**origin._asdict(), text=text_of(row, "text" if "text" in row else "content", origin.place))]


def parse_pair(row: RawRow, origin: Origin) -> Sequence[Record]:
    """Parse an input and its target, under one of the pairs of names in `INPUT_TARGET`."""
    given, wanted = next((pair for pair in INPUT_TARGET if pair[0] in row and pair[1] in row), INPUT_TARGET[0])
    place = origin.place
    return [SeqPair(**origin._asdict(), input=text_of(row, given, place), target=text_of(row, wanted, place))]


INPUT_TARGET = (("input", "target"), ("inputs", "targets"), ("source", "target"), ("document", "summary"))


def _chat(origin: Origin, messages: Sequence[Message], row: RawRow) -> ChatExample:
    check_tools(messages, origin.place)
    return ChatExample(**origin._asdict(), messages=tuple(messages), tools=tools_of(row, origin.place))


def _preference(origin: Origin, prompt: Sequence[Message], chosen: str, rejected: str, row: RawRow) -> PreferencePair:
    check_tools(prompt, origin.place)
    tools = tools_of(row, origin.place)
    return PreferencePair(**origin._asdict(), prompt=tuple(prompt), chosen=chosen, rejected=rejected, tools=tools)


def language_of(row: RawRow) -> str:
    """Return the column prefix of a file with every row in several languages: the one that is not English."""
    if "instruction" in row:
        return ""
    prefixes = [str(key)[: -len("instruction")] for key in row if str(key).endswith("_instruction")]
    return next((prefix for prefix in prefixes if prefix != "en_"), prefixes[0] if prefixes else "")
