"""A model as lm-eval drives it: its requests, its tokens, its answers, by our ways of computing them.

lm-eval asks for likelihoods of endings, likelihoods of texts, and generated text. What is asked for, how contexts and
endings become tokens, and what is cut where a model cannot read so much is lm-eval's; `endings`, `seq2seq` and
`generation` compute it. Encoder-decoders are answered without lm-eval's own backend (0.4.13): it gives a decoder as
many tokens more as the longest input of the batch has, and lets each row's answer depend on the rows beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.generation_params import Generation
from tasks.models import Model
from tasks.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def language_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_rows: int,
    generation: Generation,
    progress: Progress | None = None,
    tokens: Mapping[str, Sequence[int]] = {},
) -> Any:
    """The model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a decoder or an encoder-decoder, with or without an adapter.
        tokenizer: its own.
        batch_rows: answers that are generated at once; what is scored goes by tokens.
        generation: how answers are generated where a task does not say.
        progress: counts requests that are done.
        tokens: of texts those that training saw: made of a text anew they may be others, as where SentencePiece puts a
            space after a control token. Texts that are not in it are made into tokens as lm-eval does.
    """
    from tasks.harness_model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HarnessModel(model, tokenizer, batch_rows, generation, progress, tokens)
