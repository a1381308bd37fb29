"""What a model in training replies to a few prompts, the same each time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.chat import continuation
from tasks.generation_params import GREEDY
from tasks.models import Model
from tasks.scoring import Row
from tasks.seq2seq import PairRow, generate_targets
from tasks.templates import decode
from tasks.watch import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "samples.jsonl"


def replies(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_new_tokens: int
) -> list[dict[str, str]]:
    """The `prompt` and the model's greedy `reply` for each row; draws no random number of the training's."""
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
    """The samples of a training log as JSON lines of `step`, `prompt` and `reply`."""
    return "".join(
        json.dumps({"step": row["step"], **sample}, sort_keys=True, ensure_ascii=False) + "\n"
        for row in log
        for sample in row.get(SAMPLES, ())
    )
