"""Calls of tools in answers: the form in which a model's chat template writes them, and calls read back from it.

Templates agree on little here, so the template is asked: it renders a made-up call, and the form that this is in is the
one that answers are read by. An answer of a model whose template has another form stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.serve.text_stream import StopCutter
from tasks.core.errors import BadData
from tasks.core.records import Message, tool_call
from tasks.tokenization.chat_template import Chat, render_prompt, texts_of_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _KEY, _VALUE = "qxzvtool", "qxzvkey", "qxzvvalue"


class CallForm(NamedTuple):
    """Form of calls in an answer.

    Attributes:
        name: of the form, for people.
        opening: what stands before a call; what comes before it is the answer's text.
        body: finds the JSON of a call, or of a list of them.
        arguments: the key under which a call has its arguments.
    """

    name: str
    opening: str
    body: re.Pattern[str]
    arguments: str = "arguments"


FORMS = (
    CallForm("hermes", "<tool_call>", re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)),
    CallForm("mistral", "[TOOL_CALLS]", re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.DOTALL)),
    CallForm("llama", '{"name":', re.compile(r"(\{.*\})", re.DOTALL), "parameters"),
)
"""Forms that are read: of Qwen 2.5 and 3 and Hermes, of Mistral, and of Llama 3.1 and later."""


class Tools(NamedTuple):
    """What a chat template makes of tools.

    Attributes:
        reads: whether it tells the model of the tools that are offered.
        form: how it writes calls; None for a form that is not read here.
        shown: control tokens of the form, which are no part of an answer's text otherwise.
    """

    reads: bool
    form: CallForm | None
    shown: Mapping[int, str]


NO_TOOLS = Tools(False, None, {})
"""Of a model without a chat template."""


def tools_of(tokenizer: PreTrainedTokenizerBase) -> Tools:
    """Try out what a chat template makes of tools."""
    parameters = {"type": "object", "properties": {_KEY: {"type": "string", "description": _KEY}}}
    function = {"name": _NAME, "description": _NAME, "parameters": parameters}
    tool = json.dumps({"type": "function", "function": function})
    call = Message("assistant", "", json.dumps([{"name": _NAME, "arguments": {_KEY: _VALUE}}]))
    try:
        with_tools = _prompt(tokenizer, tool)
    except BadData:
        with_tools = ""
    (pieces,) = texts_of_chats(tokenizer, [Chat([Message("user", "qxzv"), call], [tool])])
    written = "" if isinstance(pieces, BadData) else pieces[-1]
    form = next((each for each in FORMS if each.opening in written and calls_in(written, each)), None)
    special = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = {
        number: text
        for number, text in special.items()
        if form and text in form.opening + form.body.pattern.replace("\\", "") and number != tokenizer.eos_token_id
    }
    return Tools(_NAME in with_tools, form, shown)


def _prompt(tokenizer: PreTrainedTokenizerBase, tool: str) -> str:
    ids = render_prompt(tokenizer, [Message("user", "qxzv")], [tool])
    return str(tokenizer.decode(ids))


def calls_in(text: str, form: CallForm) -> list[dict[str, Any]]:
    """Read the calls of an answer, as OpenAI's API has them; none when there is one that cannot be read.

    Args:
        text: the answer from the opening of its first call on.
        form: of the model's template.
    """
    found: list[dict[str, Any]] = []
    for body in form.body.findall(text):
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            return []
        for each in given if isinstance(given, list) else [given]:
            arguments = each.get(form.arguments) if isinstance(each, dict) else None
            if not isinstance(arguments, dict) or not isinstance(each.get("name"), str):
                return []
            written = json.dumps(arguments, ensure_ascii=False)
            found.append(tool_call(f"call_{uuid.uuid4().hex[:24]}", each["name"], written))
    return found


class CallReader:
    """Splits an answer that comes in pieces into its text and the calls behind it.

    Args:
        form: how the model writes calls; None where no tools were offered, or in a form that is not read.
    """

    def __init__(self, form: CallForm | None) -> None:
        self._form = form
        self._before = StopCutter([form.opening] if form else [])
        self._all, self._said = "", 0

    def add(self, piece: str) -> str:
        """Return the text that is certain to stand before any call."""
        text = self._before.add(piece)
        self._all += piece
        self._said += len(text)
        return text

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the text that was held back, and the calls; what cannot be read as calls is text."""
        behind = self._all[self._said :]
        calls = calls_in(behind, self._form) if self._form and self._before.stopped else []
        return ("", calls) if calls else (behind, [])
