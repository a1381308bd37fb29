"""One continuation by transformers' `generate`, told token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from tasks.adapters.prompt_tuning import for_generation
from tasks.inference.decoding import Asked, Ended, Written, written
from tasks.inference.rope import own_frequencies
from tasks.inference.sampling import decoding
from tasks.inference.turns import in_turn
from tasks.models.decoder import unwrapped
from tasks.models.device import host_read, upload
from tasks.models.loader import Model


def stream(
    model: Model, end_ids: Collection[int], asked: Asked, tell: Callable[[Written], None], wanted: Callable[[], bool]
) -> Ended:
    """Write one continuation, and tell each token as it is chosen; returns how it ended.

    Args:
        model: a decoder, or an encoder-decoder, which reads the prompt as its input.
        end_ids: tokens that end it.
        asked: what is asked for; the model has its adapter already.
        tell: is called with each token.
        wanted: is asked after each token whether to go on.
    """
    told = _Told(asked, tell, wanted, frozenset(end_ids))
    start = 1 if model.config.is_encoder_decoder else len(asked.prompt)
    chosen: Any = decoding(model, asked.generation, [asked.prompt], start=start)["logits_processor"]
    ids = upload([list(asked.prompt)], model.device)
    reading = host_read("each new token, which may be the last")
    with torch.no_grad(), in_turn(model), own_frequencies(unwrapped(model)), reading:
        for_generation(model).generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([told.see, *chosen]),
            stopping_criteria=StoppingCriteriaList([told.end]),
        )
    return Ended(told.reason)


class _Told:
    """What is told of a continuation while `generate` writes it."""

    def __init__(
        self, asked: Asked, tell: Callable[[Written], None], wanted: Callable[[], bool], end_ids: frozenset[int]
    ) -> None:
        self._asked, self._tell, self._wanted, self._end_ids = asked, tell, wanted, end_ids
        self._logits = torch.empty(0)
        self.reason = "length"

    def see(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the model's own logits, (1, vocabulary), and rule out what a constraint does not allow."""
        self._logits = scores[0]
        if self._asked.constraint is None:
            return scores
        return scores.masked_fill(~upload(self._asked.constraint.allowed(), scores.device), -torch.inf)

    def end(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Tell the last token of `ids`, (1, tokens), and whether it ends the continuation."""
        token = int(ids[0, -1])
        if self._asked.constraint:
            self._asked.constraint.take(token)
        self._tell(written(self._asked, self._logits, token))
        if token in self._end_ids:
            self.reason = "stop"
        elif not self._wanted():
            self.reason = "cancelled"
        return torch.tensor([self.reason != "length"], device=ids.device)
