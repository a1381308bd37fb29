"""A model as lm-eval drives it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tasks.architecture import ENCODER_DECODER, architecture_of
from tasks.generation_params import Generation
from tasks.models import Model
from tasks.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_TOKENS = 256
"""In an answer, where a task of lm-eval does not say."""


def language_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_rows: int,
    generation: Generation,
    progress: Progress | None = None,
    tokens: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Any:
    """An `lm_eval.api.model.LM` over a model that is loaded.

    Args:
        model: a decoder or an encoder-decoder, with or without an adapter.
        tokenizer: its own.
        batch_rows: rows in a forward pass.
        generation: how tokens are chosen.
        progress: counts generated rows.
        tokens: of prompts that were rendered: made of their texts anew they may be others.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    kind = _encoder_decoder if architecture_of(model) is ENCODER_DECODER else _decoder
    return kind(model, tokenizer, batch_rows, generation, progress, tokens)


def _decoder(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batch_rows: int,
    generation: Generation,
    progress: Progress | None,
    tokens: Mapping[str, Sequence[int]],
) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    from tasks.architecture import positions_of
    from tasks.generation import decoding

    class Decoder(HFLM):  # type: ignore[misc]  # lm-eval's class is untyped
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return list(tokens[string]) if string in tokens else super().tok_encode(string, *args, **kwargs)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context not in tokens:
                pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
                return pair
            return list(tokens[context]), super().tok_encode(continuation, add_special_tokens=False)

        def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            if not all(text in tokens for text in strings):
                return super().tok_batch_encode(strings, *args, **kwargs)
            longest = max(len(tokens[text]) for text in strings)
            ids = torch.full((len(strings), longest), tokenizer.pad_token_id)
            attended = torch.zeros_like(ids)
            for number, text in enumerate(strings):
                ids[number, longest - len(tokens[text]) :] = torch.tensor(tokens[text])
                attended[number, longest - len(tokens[text]) :] = 1
            return ids, attended

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs |= decoding(model, generation, context, kwargs["attention_mask"])
            kwargs["eos_token_id"] = tokenizer.eos_token_id
            answered = super()._model_generate(context, *args, **kwargs)
            if progress:
                progress.step(by=len(context))
            return answered

    longest = positions_of(model.config)
    return Decoder(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_rows,
        # of a model that does not say how much it reads lm-eval would cut prompts to 2048 tokens
        max_length=int(longest) if longest < float("inf") else 1 << 20,
    )


def _encoder_decoder(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    batch_rows: int,
    generation: Generation,
    progress: Progress | None,
    tokens: Mapping[str, Sequence[int]],
) -> Any:
    """Through the model's own forward pass: lm-eval's backend (0.4.13) answers differently in different batches."""
    import torch
    from lm_eval.api.model import LM

    from tasks.seq2seq import PairRow, generate_targets, score_pairs
    from tasks.templates import decode

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text)["input_ids"]
        return tokens.get(text, ids)

    class EncoderDecoder(LM):  # type: ignore[misc]  # lm-eval's class is untyped
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = []
            for start in range(0, len(requests), batch_rows):
                given = [request.args for request in requests[start : start + batch_rows]]
                rows = [PairRow(encode(c), tokenizer(e, add_special_tokens=False)["input_ids"]) for c, e in given]
                with torch.no_grad():
                    sums = score_pairs(model, rows).row_sums().tolist()
                found += zip(sums, self._greedy(rows), strict=True)
            return found

        def _greedy(self, rows: Sequence[PairRow]) -> list[bool]:
            from tasks.generation_params import GREEDY

            longest = max(len(row.target_ids) for row in rows)
            written = generate_targets(model, tokenizer, [row.input_ids for row in rows], longest, GREEDY)
            return [list(row.target_ids) == ids[: len(row.target_ids)] for row, ids in zip(rows, written, strict=True)]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return [logp for logp, _ in self.loglikelihood([_Pair(("", request.args[0])) for request in requests])]

        def generate_until(self, requests: Any) -> list[str]:
            answers: list[str] = []
            for start in range(0, len(requests), batch_rows):
                given = [request.args for request in requests[start : start + batch_rows]]
                most = max(options.get("max_gen_toks", MOST_TOKENS) for _, options in given)
                ids = generate_targets(model, tokenizer, [encode(text) for text, _ in given], most, generation)
                answers += [
                    _until(
                        decode(tokenizer, each[: options.get("max_gen_toks", MOST_TOKENS)]), options.get("until", [])
                    )
                    for each, (_, options) in zip(ids, given, strict=True)
                ]
                if progress:
                    progress.step(by=len(given))
            return answers

    return EncoderDecoder()


class _Pair:
    def __init__(self, args: tuple[str, str]) -> None:
        self.args = args


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text
