"""Messages to token ids, by the model's own chat template: the one place that training, evaluation and serving share.

A prompt and its reply are tokenised apart and joined, because that is what a model sees when it answers: first the
whole prompt, then its own tokens. Text that would merge across the seam can therefore never make training differ from
serving. Templates run in the immutable Jinja sandbox of transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.errors import BadData, BadModel
from tasks.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(NamedTuple):
    """A chat as tokens: `mask` is true where the loss falls, `prompt_tokens` the length of what comes before that."""

    ids: list[int]
    mask: list[bool]
    prompt_tokens: int


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template and a stop token that is not the padding.

    Raises:
        BadModel: it does not load, or lacks one of these.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the loader raises whatever its parsers raise
        raise BadModel(
            "its tokenizer does not load", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0]
        ) from error
    if not tokenizer.chat_template:
        raise BadModel(
            "its tokenizer has no chat template",
            where=str(folder),
            fix="put a chat_template.jinja beside tokenizer.json",
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadModel(
            "its tokenizer has no stop token of its own: padding equal to the stop token would hide the end of a turn",
            where=str(folder),
            got=f"eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}",
            fix="set eos_token and a different pad_token in tokenizer_config.json",
        )
    return tokenizer


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 of the chat template, by which two models are known to be prompted alike."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation up to where the assistant begins to answer."""
    return _encode(tokenizer, _text(tokenizer, messages, answering=True))


def render_reply(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], reply: str) -> list[int]:
    """The token ids of a reply to `prompt`, up to and including the stop token.

    Raises:
        BadData: the template rewrites what came before the reply, drops the reply, or does not end it with the stop
        token.
    """
    before = _text(tokenizer, prompt, answering=True)
    after = _text(tokenizer, [*prompt, Message("assistant", reply)], answering=False)
    if not after.startswith(before):
        raise BadData("the chat template rewrites the prompt once it is answered, so no loss mask can be told")
    if reply.strip() not in after[len(before) :]:
        raise BadData("the chat template drops or changes the assistant's text", got=repr(after[len(before) :][:60]))
    ids = _encode(tokenizer, after[len(before) :])
    if tokenizer.eos_token_id not in ids:
        raise BadData("the chat template does not end a reply with the stop token", expected=repr(tokenizer.eos_token))
    return ids[: ids.index(tokenizer.eos_token_id) + 1]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Rendered:
    """A chat as tokens, with the loss on every assistant turn and its stop token.

    What stands after the last assistant turn is left out: nothing is learnt from it.

    Raises:
        BadData: there is no assistant turn, or the tokens of a turn change once a later one is added.
    """
    ids: list[int] = []
    mask: list[bool] = []
    first = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        if prompt[: len(ids)] != ids:
            raise BadData("the tokens of an earlier turn change when the next is added", got=f"turn {index + 1}")
        reply = render_reply(tokenizer, messages[:index], message.content)
        first = first or len(prompt)
        mask += [False] * (len(prompt) - len(ids)) + [True] * len(reply)
        ids = prompt + reply
    if not ids:
        raise BadData("has nothing to learn from (no assistant turn)")
    return Rendered(ids, mask, first)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, without control tokens and white space around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answering: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [message._asdict() for message in messages], tokenize=False, add_generation_prompt=answering
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise BadData("the chat template refuses this conversation", got=str(error)) from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
