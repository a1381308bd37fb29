"""Evaluation in the course of a training: held-out loss, and replies to a few prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.engine.evaluation_hooks import EvalHook, EvalHooks
from tasks.inference.chat import continuation
from tasks.inference.encoder_decoder import PairRow, generate_targets
from tasks.inference.params import GREEDY
from tasks.inference.rendered_rows import Row
from tasks.models.loader import Model
from tasks.reports.training_log import HELD_OUT_LOSS, SAMPLES
from tasks.tokenization.tokenizer import decode
from tasks.train.examples import Example
from tasks.train.params import Evaluation, Method, Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FILE = "samples.jsonl"


def replies(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_new_tokens: int
) -> list[dict[str, str]]:
    """Generate the `prompt` and the model's greedy `reply` for each row; draw no random number of the training's."""
    model.eval()
    found = []
    for row in rows:
        if isinstance(row, PairRow):
            prompt = list(row.input_ids)
            (new,) = generate_targets(model, tokenizer, [prompt], max_new_tokens, GREEDY)
        else:
            prompt = list(row.ids[: row.prompt_tokens])
            new = continuation(model, tokenizer, prompt, max_new_tokens)
        found.append({"prompt": str(tokenizer.decode(prompt)), "reply": decode(tokenizer, new)})
    model.train()
    return found


def lines_of(log: Iterable[Mapping[str, Any]]) -> str:
    """Format the samples of a training log as JSON lines of `step`, `prompt` and `reply`."""
    return "".join(
        json.dumps({"step": row["step"], **sample}, sort_keys=True, ensure_ascii=False) + "\n"
        for row in log
        for sample in row.get(SAMPLES, ())
    )


def watch_for(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    method: Method,
    loss: Callable[[], float],
) -> EvalHooks:
    """Build what params measure in the course of the training; `loss` is that of the held-out rows."""
    looks, patience, keep_best = list[EvalHook](), None, False
    if isinstance(method.evaluation, Evaluation):
        asked = method.evaluation
        patience = None if asked.early_stopping_patience == "never" else asked.early_stopping_patience
        keep_best = asked.keep == "best"
        looks.append(EvalHook(HELD_OUT_LOSS, asked.every_steps, loss))
    if isinstance(method.samples, Samples):
        wanted, prompts = method.samples, [example[0] for example in held_out[: method.samples.prompts]]
        looks.append(
            EvalHook(SAMPLES, wanted.every_steps, lambda: replies(model, tokenizer, prompts, wanted.max_new_tokens))
        )
    return EvalHooks(looks, patience, keep_best)
