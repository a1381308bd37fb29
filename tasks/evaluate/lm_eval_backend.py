"""A model as lm-eval drives it: its requests, its tokens, its answers, by our ways of computing them.

lm-eval asks for likelihoods of endings, likelihoods of texts, and generated text. What is asked for, how contexts and
endings become tokens, and what is cut where a model cannot read so much is lm-eval's; `continuation_scores`,
`encoder_decoder` and `sampling` compute it. Encoder-decoders are answered without lm-eval's own backend (0.4.13): it
gives a decoder as many tokens more as the longest input of the batch has, and lets each row's answer depend on the rows
beside it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tasks.adapters.prompt_tuning import virtual_tokens
from tasks.core.errors import BadData, BadParams
from tasks.core.progress import Progress
from tasks.evaluate.continuation_scores import TOKENS_AT_ONCE, Continuation, score_continuations
from tasks.inference.continuations import StopTexts, each_continuation
from tasks.inference.encoder_decoder import PairRow, score_pair_rows
from tasks.inference.params import Generation, generation_of
from tasks.inference.rows import Likelihood
from tasks.models.loader import Model
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_of, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REQUESTS = 8192
"""So many are made into tokens and scored at a time: memory does not grow with a suite."""
_DRAWS = ("temperature", "top_k", "top_p")
_KNOWN = {*_DRAWS, "do_sample", "repetition_penalty", "until"}
_LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval's class is untyped
    """lm-eval's model, whose contexts are computed once and whose answers do not depend on their batch."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        generation: Generation,
        progress: Progress | None,
        tokens: Mapping[str, Sequence[int]],
    ) -> None:
        """Wrap a model as `harness.language_model` describes."""
        self._writes = architecture_of(model) is ENCODER_DECODER
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="seq2seq" if self._writes else "causal",
            batch_size=batch_size,
        )
        self._generation, self._rows, self._tokens = generation, batch_size, tokens
        self._done: Callable[[int], None] = (
            (lambda count: progress.step(by=count)) if progress else (lambda count: None)
        )
        self._ahead: dict[str, list[int]] = {}

    @property
    def max_length(self) -> int:
        """Return the tokens that are scored at once: lm-eval's limit, less what a soft prompt takes up.

        It is 2,048 where neither the model nor the tokenizer has one; prompts that are answered are then never cut.
        """
        limit: int = super().max_length
        return limit - virtual_tokens(self.model)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """lm-eval's tokens, unless they are known already."""
        if add_special_tokens is None and not more:
            if string in self._tokens:
                return list(self._tokens[string])
            if string in self._ahead:
                return self._ahead[string]
        found: list[int] = super().tok_encode(string, add_special_tokens, **more)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's split; behind a context whose tokens training saw, a continuation's tokens are its own."""
        whole = context + continuation
        if context in self._tokens and whole not in self._tokens:
            return list(self._tokens[context]), self.tok_encode(continuation, add_special_tokens=False)
        context_ids, ids = super()._encode_pair(context, continuation)
        return context_ids, ids

    def _encode_ahead(self, texts: Sequence[str]) -> None:
        """Tokenise texts as `tok_encode` does one by one, all at once."""
        self._ahead = {}
        if not self.tokenizer.is_fast:
            return
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        by_kind: dict[bool, list[str]] = {}
        prefix = self.tokenizer.decode(self.prefix_token_id)
        for text in dict.fromkeys(texts):
            by_kind.setdefault(text.startswith(prefix), []).append(text)
        for begun, alike in by_kind.items():
            encoded = backend.encode_batch_fast(alike, add_special_tokens=not begun)
            self._ahead |= zip(alike, (each.ids for each in encoded), strict=True)

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute the log-probabilities of continuations, given contexts."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), REQUESTS):
            some = requests[start : start + REQUESTS]
            if not self._writes:
                pairs = [request.args for request in some if request.args[0]]
                self._encode_ahead([text for before, after in pairs for text in (before.rstrip(), before + after)])
            found += super().loglikelihood(some, disable_tqdm=True)
        self._ahead = {}
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Compute the log-probabilities of whole texts, read in windows that overlap by one token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            before = len(windows)
            rolled = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in rolled]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        found = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, logp in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Compute the log-probabilities of tokens, cut on the left to what the model reads."""
        for names, before, after in requests:
            if not before or not after or len(after) > self.max_length:
                raise BadData(
                    "a continuation cannot be scored: it must have from one token to as many as the model reads",
                    where=repr(names)[:200],
                    got=f"{len(before)} tokens, then {len(after)}",
                    expected=f"at most {self.max_length}",
                )
        if self._writes:
            cut = [PairRow(before[-self.max_length :], after) for _, before, after in requests]
            scores: list[Likelihood] = score_pair_rows(self.model, cut, tokens=TOKENS_AT_ONCE, done=self._done)
        else:
            kept = ((self.max_length + 1 - len(after), before, after) for _, before, after in requests)
            scores = score_continuations(
                self.model, [Continuation(b[-room:], a) for room, b, a in kept], done=self._done
            )
        for (names, *_), score in zip(requests, scores, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, tuple(score))
        return [(score.logp, score.greedy) for score in scores]

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate answers to contexts; those with the same options together, the longest first."""
        found: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in alike.values():
            contexts = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers}
            order = sorted(numbers, key=lambda n: (-len(contexts[n]), contexts[n], n))
            for place, answer in self._answers([contexts[n] for n in order], requests[order[0]].args[1]):
                found[order[place]] = answer
                self.cache_hook.add_partial("generate_until", requests[order[place]].args, answer)
                self._done(1)
        return [found[n] for n in range(len(requests))]

    def _answers(self, contexts: Sequence[Sequence[int]], asked: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """Generate an answer to each context, up to the first of its stop texts, and yield them as they are done."""
        said = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        until = handle_stop_sequences(said["until"], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        most, generation = said["max_gen_toks"], asked_generation(self._generation, asked)
        room = positions_of(self.model.config) - virtual_tokens(self.model) - (0 if self._writes else most)
        if room <= 0:
            raise BadData(
                "a task asks for longer answers than the model can write",
                where="max_gen_toks",
                got=str(most),
                expected=f"less than {positions_of(self.model.config) - virtual_tokens(self.model):.0f}",
            )
        cut = [list(ids[-int(room) :]) if len(ids) > room else list(ids) for ids in contexts]
        stop = StopTexts(self.tokenizer, until, len(cut))
        for row, ids in each_continuation(self.model, self.tokenizer, cut, most, generation, stop, rows=self._rows):
            yield row, postprocess_generated_text(self.tok_decode(ids[: stop.lengths[row]]), until, None)


def asked_generation(own: Generation, asked: Mapping[str, Any]) -> Generation:
    """Return an answer's options: a task's `generation_kwargs`, and `own` where they leave one out.

    Raises:
        BadParams: they need something that temper lacks, or a value is wrong.
    """
    if unknown := sorted(set(asked) - _KNOWN - _LENGTHS):
        raise BadParams(
            "a task asks for ways of generating that temper lacks",
            where="generation_kwargs",
            got=", ".join(unknown),
            expected=f"only {', '.join(sorted(_KNOWN | _LENGTHS))}",
        )
    wanted = own.model_dump()
    said = {name: asked[name] for name in (*_DRAWS, "repetition_penalty") if asked.get(name) is not None}
    if not asked.get("do_sample", said.get("temperature", 0) > 0):
        said = {name: value for name, value in said.items() if name not in _DRAWS}
        greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
        said |= greedy if "do_sample" in asked or "temperature" in asked else {}
    elif not said.get("temperature"):
        said["temperature"] = 1.0
    return generation_of({**wanted, **said}, "generation_kwargs")


def language_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    generation: Generation,
    progress: Progress | None = None,
    tokens: Mapping[str, Sequence[int]] = {},
) -> Any:
    """Build the model for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a decoder or an encoder-decoder, with or without an adapter.
        tokenizer: its own.
        batch_size: answers that are generated at once; what is scored goes by tokens.
        generation: how answers are generated where a task does not say.
        progress: counts requests that are done.
        tokens: of texts those that training saw: made of a text anew they may be others, as where SentencePiece puts a
            space after a control token. Texts that are not in it are made into tokens as lm-eval does.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HarnessModel(model, tokenizer, batch_size, generation, progress, tokens)
