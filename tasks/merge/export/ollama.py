"""A Modelfile for Ollama: the model's chat template in Ollama's own language, found by trying the template out.

Ollama fills Go templates, not Jinja. What a template writes before, between and after turns is read off conversations
with marks in them, and the Go template made of these pieces is held against the Jinja one on further conversations
before it is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.errors import BadData, BadModel
from tasks.core.records import Message
from tasks.tokenization.chat_template import Chat, texts_of_replies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = "qzsystem", "qzasked", "qzanswered", "qzagain"


class Pieces(NamedTuple):
    """Pieces of text that a chat template writes around the turns.

    Attributes:
        start: before the first user turn, where there is no system message.
        system: before and after a system message, up to the first user turn; None where the template takes none.
        reply: from a user turn to the reply.
        again: from a reply to the next user turn.
        answer: from the last user turn on, where the model begins.
    """

    start: str
    system: tuple[str, str] | None
    reply: str
    again: str
    answer: str

    def text(self, messages: Sequence[Message]) -> str:
        """Render the conversation as the Go template writes it."""
        before, turns = self.start, list(messages)
        if self.system and turns[0].role == "system":
            before = self.system[0] + turns.pop(0).content + self.system[1]
        text = before + turns[0].content
        for turn in turns[1:]:
            text += (self.reply if turn.role == "assistant" else self.again) + turn.content
        return text + self.answer


def modelfile(tokenizer: PreTrainedTokenizerBase, weights: str, longest: int) -> str:
    """Build the Modelfile of a model.

    Args:
        tokenizer: the model's own, with its chat template.
        weights: the name of the GGUF file beside it.
        longest: how many tokens the model takes in.

    Raises:
        BadModel: the chat template is none that can be written in Ollama's language.
    """
    pieces = pieces_of(tokenizer)
    stop = str(tokenizer.eos_token)
    lines = [
        f"FROM ./{weights}",
        f'TEMPLATE """{go_template(pieces, str(tokenizer.bos_token or ""))}"""',
        f'PARAMETER stop "{stop}"',
        f"PARAMETER num_ctx {longest}",
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Find what the tokenizer's chat template writes around turns.

    Raises:
        BadModel: it writes something else as conversations go on.
    """
    user, reply, again = Message("user", _ASKED), Message("assistant", _ANSWERED), Message("user", _AGAIN)
    system = Message("system", _SYSTEM)
    start, answer = _cut(_text(tokenizer, [user]), _ASKED)
    _, later = _cut(_text(tokenizer, [user, reply, again]), _ASKED)
    to_reply, later = _cut(later, _ANSWERED)
    to_again, _ = _cut(later, _AGAIN)
    try:
        before, after = _cut(_text(tokenizer, [system, user]), _SYSTEM)
        with_system = (before, _cut(after, _ASKED)[0])
    except BadData:
        with_system = None
    pieces = Pieces(start, with_system, to_reply, to_again, answer)
    for conversation in _TRIED:
        if with_system is None and conversation[0].role == "system":
            continue
        if pieces.text(conversation) != _text(tokenizer, conversation):
            raise BadModel(
                "the chat template is none that can be written for Ollama: what it writes depends on more than turns",
                got=_text(tokenizer, conversation)[:120],
                expected=pieces.text(conversation)[:120],
                fix="leave `ollama` false, and write a Modelfile by hand",
            )
    return pieces


_TRIED = [
    [Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?\nAnd three?")],
    [Message("system", "Be brief."), Message("user", "One?")],
    [
        Message("system", "Be brief."),
        *(Message(role, f"{role} {n}") for n in range(3) for role in ("user", "assistant")),
        Message("user", "你好"),
    ],
]
"""Conversations that a Go template must write as the Jinja template does."""


def go_template(pieces: Pieces, bos: str) -> str:
    """Write the pieces in Ollama's language; the token that begins a text is left to Ollama, which writes it itself."""
    start = _literal(pieces.start.removeprefix(bos))
    if pieces.system:
        before, after = pieces.system
        before = _literal(before.removeprefix(bos))
        start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{_literal(after)}{{{{ else }}}}{start}{{{{ end }}}}"
    again = f"{{{{ if $later }}}}{_literal(pieces.again)}{{{{ end }}}}{{{{ $later = true }}}}{{{{ .Content }}}}"
    reply = f"{_literal(pieces.reply)}{{{{ .Content }}}}"
    turns = f'{{{{ if eq .Role "user" }}}}{again}{{{{ else if eq .Role "assistant" }}}}{reply}{{{{ end }}}}'
    return f"{start}{{{{ $later := false }}}}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{_literal(pieces.answer)}"


def begins_with(tokenizer: PreTrainedTokenizerBase, token: str | None) -> bool:
    """Return whether the chat template begins conversations with a token."""
    return bool(token) and _text(tokenizer, [Message("user", _ASKED)]).startswith(str(token))


def _literal(text: str) -> str:
    if '"""' in text:
        raise BadModel("the chat template writes three quotes in a row, which a Modelfile cannot hold", got=text)
    return text.replace("{{", '{{ "{{" }}')


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Render a conversation up to where the model answers.

    Raises:
        BadData: the template refuses it.
    """
    (pieces,) = texts_of_replies(tokenizer, [Chat(messages)], [[]])
    if isinstance(pieces, BadData):
        raise pieces
    return pieces[0]


def _cut(text: str, mark: str) -> tuple[str, str]:
    """Split a text into what stands before a mark and after it."""
    before, _, after = text.partition(mark)
    return before, after
