"""One reply to one conversation, or to one input: the same tokens that training and evaluation use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.records import Message
from tasks.inference.encoder_decoder import generate_targets
from tasks.inference.params import GREEDY, Generation
from tasks.tokenization.chat_template import render_prompt
from tasks.tokenization.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.models.loader import Model


class Reply(NamedTuple):
    """Reply of a model; `stopped` is true when it came to an end by itself."""

    text: str
    stopped: bool
    prompt_tokens: int
    tokens: int


def answer(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_tokens: int,
    generation: Generation = GREEDY,
) -> Reply:
    """Generate the model's reply to a conversation that ends with a user turn."""
    prompt = render_prompt(tokenizer, messages)
    new = continuation(model, tokenizer, prompt, max_tokens, generation)
    return Reply(decode(tokenizer, new), tokenizer.eos_token_id in new, len(prompt), len(new))


def continuation(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    max_tokens: int,
    generation: Generation = GREEDY,
) -> list[int]:
    """Generate the tokens that a decoder writes after a prompt."""
    from tasks.inference.continuations import continuations

    (new,) = continuations(model, tokenizer, [prompt], max_tokens, generation)
    return new


def answer_text(
    model: Model, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, generation: Generation = GREEDY
) -> Reply:
    """Generate what an encoder-decoder model writes for an input."""
    ids = list(tokenizer(text)["input_ids"])
    (new,) = generate_targets(model, tokenizer, [ids], max_tokens, generation)
    return Reply(decode(tokenizer, new), tokenizer.eos_token_id in new, len(ids), len(new))
