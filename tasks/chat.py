"""One reply to one conversation, or to one input: the same tokens that training and evaluation use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.generation_params import GREEDY, Generation
from tasks.records import Message
from tasks.seq2seq import generate_targets, until
from tasks.templates import decode, render_prompt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tasks.models import Model


class Reply(NamedTuple):
    """What a model said; `stopped` tells whether it came to an end by itself."""

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
    """The model's reply to a conversation that ends with a user turn."""
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
    """The tokens that a decoder writes after a prompt's."""
    return continuations(model, tokenizer, [prompt], max_tokens, generation)[0]


def continuations(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    generation: Generation = GREEDY,
) -> list[list[int]]:
    """The tokens that a decoder writes after each prompt, up to and including its stop token; one batch."""
    import torch

    from tasks.generation import decoding

    longest = max(map(len, prompts))
    fill = tokenizer.pad_token_id
    ids = torch.tensor([[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    attended = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    with torch.no_grad():
        out: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attended,
            max_new_tokens=max_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=fill,
            **decoding(model, generation, ids, attended),
        )
    return [until(new, tokenizer.eos_token_id) for new in out[:, longest:].tolist()]


def answer_text(
    model: Model, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, generation: Generation = GREEDY
) -> Reply:
    """What an encoder-decoder model writes for an input."""
    ids = list(tokenizer(text)["input_ids"])
    (new,) = generate_targets(model, tokenizer, [ids], max_tokens, generation)
    return Reply(decode(tokenizer, new), tokenizer.eos_token_id in new, len(ids), len(new))
