"""Whether an engine writes what temper's own would: its greedy tokens, by the logits of the model as temper has it.

By induction each token that is the likeliest after the same tokens before makes both greedy texts the same. Two ways to
compute a model round differently, so where two tokens are nearly as likely, an engine may take the other one: that is
a tie. Its text goes on from there, and so does the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import NotEquivalent
from tasks.inference.decoding import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.models.loader import Model

PROBES = (
    "Hello",
    "What is 17 plus 25?",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small house at the edge of a forest.",
    "请用一句话介绍一下北京。",
)
"""User's turns: a word, a question, code, prose, another alphabet."""
PROBE_TOKENS = 24

EXACT, ROUNDED = 0.01, 0.1
"""How much less likely than the likeliest one a token of a tie may be, in standard deviations of the logits at its
place: where both compute in float32, and where numbers have fewer bits. Ten times and twice what the hidden states of
two orders of computing may differ by (`tasks/inference/agreement.py`), relative to their norm."""

Write = Callable[[Asked], tuple[list[int], str]]
"""Gives an engine's tokens for a prompt, and why it ended."""


class Parity(NamedTuple):
    """What was found: how many tokens of how many prompts were compared, and how many of these were ties."""

    prompts: int
    tokens: int
    ties: int

    def __str__(self) -> str:
        ties = f", of which {self.ties} are ties by rounding" if self.ties else ""
        return f"{self.tokens} tokens of {self.prompts} prompts as temper's own{ties}"


def probe_prompts(tokenizer: PreTrainedTokenizerBase, room: int | None) -> list[list[int]]:
    """Return prompts as requests have them: rendered, or plain where there is no chat template.

    Args:
        tokenizer: of the model.
        room: tokens that a prompt and its answer may have; longer prompts are left out. None: any number.
    """
    from tasks.core.records import Message
    from tasks.tokenization.chat_template import render_prompt

    prompts = [
        render_prompt(tokenizer, [Message("user", text)])
        if tokenizer.chat_template
        else list(tokenizer(text)["input_ids"])
        for text in PROBES
    ]
    return [prompt for prompt in prompts if room is None or len(prompt) + PROBE_TOKENS <= room]


def check_parity(
    write: Write,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    end_ids: Collection[int],
    *,
    exact: bool,
    where: str,
) -> Parity:
    """Hold an engine's greedy tokens against the model's own logits.

    Args:
        write: asks the engine.
        model: as temper loads it.
        tokenizer: of the model.
        prompts: a few.
        end_ids: tokens that end a continuation.
        exact: whether both compute in float32.
        where: names the version and the engine, for the error.

    Raises:
        NotEquivalent: a token differs that is no tie, or an answer ends where it should not.
        EngineFailed: the engine gives no tokens.
    """
    tokens = ties = 0
    for number, prompt in enumerate(prompts):
        new, reason = write(Asked(tuple(prompt), PROBE_TOKENS))
        place = f"{where}, prompt {number + 1}"
        _check_end(new, reason, end_ids, place)
        away = _behind(model, prompt, new)
        for step, (behind, likeliest) in enumerate(away):
            if behind > (EXACT if exact else ROUNDED):
                raise NotEquivalent(
                    "the engine writes other tokens than temper's own",
                    where=f"{place}, token {step + 1}",
                    got=f"{_shown(tokenizer, new[step])}, {behind:.3f} standard deviations of the logits less likely",
                    expected=f"{_shown(tokenizer, likeliest)}, or one within {EXACT if exact else ROUNDED}",
                    fix="see that the engine reads this very model, in this number format (--engine-dtype), and knows "
                    "its architecture",
                )
        tokens, ties = tokens + len(new), ties + sum(behind > 0 for behind, _ in away)
    return Parity(len(prompts), tokens, ties)


def _check_end(new: Sequence[int], reason: str, end_ids: Collection[int], where: str) -> None:
    """Check that an answer ends with an end token, or where it has as many as were asked for."""
    ends = [step for step, token in enumerate(new) if token in end_ids]
    right = [len(new) - 1] if reason == "stop" else []
    if ends != right or (reason == "length" and len(new) != PROBE_TOKENS):
        raise NotEquivalent(
            "the engine ends answers elsewhere than temper's own",
            where=where,
            got=f"{len(new)} tokens, end tokens at {ends or 'no place'}, ended by {reason}",
            expected=f"an end token ({', '.join(map(str, sorted(end_ids)))}) at the end, or {PROBE_TOKENS} tokens",
        )


def _behind(model: Any, prompt: Sequence[int], new: Sequence[int]) -> list[tuple[float, int]]:
    """Return of each new token how far its logit is below the largest, in standard deviations, and which that is of."""
    import torch

    from tasks.models.device import upload

    with torch.no_grad():
        ids = upload([[*prompt, *new]], model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        largest = logits.max(dim=-1)
        own = logits.gather(1, upload([[token] for token in new], model.device))[:, 0]
        behind = (largest.values - own) / logits.std(dim=-1)
        return list(zip(behind.tolist(), largest.indices.tolist(), strict=True))


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return f"{token} ({tokenizer.decode([token])!r})"
