"""Times ORPO steps with LoRA against TRL's ORPOTrainer on the same token ids, and compares losses and gradients.

    .venv/bin/python -m bench.orpo [--shape tiny] [--dtype float32] [--rows 64] [--rounds 5] [--prompt 96] [--reply 96]

Random Llamas, random tokens, replies of a quarter to all of `--reply` tokens and prompts likewise; long prompts are
`--prompt 256 --reply 128`. The loss is TRL's own, whose likelihood term is over prompt and chosen reply. Anchors:
ORPOTrainer as shipped ("default"), and without checkpointing, grouped by length, with its best batch size ("tuned").
Nothing else should run meanwhile.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.clock import ROOT
from bench.limits import SHAPES
from bench.operations import Needed
from bench.steps import BATCH_ROWS, COMMON, Race, Theirs, parser_of, random_tokens, run, spin_while_waiting, token_row
from tasks.core.stage import quiet_libraries
from tasks.inference.rows import TokenRow

WEIGHT = 0.1

Pair = tuple[TokenRow, TokenRow]
"""The chosen reply and the rejected one, each after the prompt."""


def pairs_of(count: int, prompt: int, reply: int, vocabulary: int) -> list[Pair]:
    """Build `count` pairs of random tokens."""
    draw = random.Random(0)
    tokens = partial(random_tokens, draw, vocabulary=vocabulary)
    asked = [tokens(prompt) for _ in range(count)]
    return [(token_row(each, tokens(reply)), token_row(each, tokens(reply))) for each in asked]


def needed_of(pair: Pair) -> Needed:
    """Count the operations that a pair needs, including the likelihoods of its prompt."""
    chosen, rejected = pair
    scored = chosen.tokens - 1 + rejected.scored_tokens
    return Needed.by(chosen.prompt_tokens, [chosen.scored_tokens, rejected.scored_tokens], scored)


def our_loss(model: Any, batch: Sequence[Pair]) -> Any:
    """Compute the stage's penalty, and the likelihood of prompts as well: all rows in one pass."""
    from tasks.inference.logprobs import score_tokens
    from tasks.inference.rows import Scored
    from tasks.models.device import upload
    from tasks.train.objectives import orpo_loss

    whole = [chosen._replace(mask=[False] + [True] * (chosen.tokens - 1)) for chosen, _ in batch]
    scored = score_tokens(model, [*whole, *(rejected for _, rejected in batch)])
    replied = [n >= row.prompt_tokens for row, _ in batch for n in range(1, row.tokens)]
    replied += [True] * (len(scored.logp) - len(replied))
    reply = upload([place for place, is_reply in enumerate(replied) if is_reply], scored.logp.device)
    tokens = [row.scored_tokens for pair in zip(*batch, strict=True) for row in pair]
    means = Scored.of(scored.logp.index_select(0, reply), tokens).row_means()
    chosen, rejected = means[: len(batch)], means[len(batch) :]
    return orpo_loss(chosen, rejected, -scored.logp[: sum(scored.tokens[: len(batch)])].mean(), weight=WEIGHT).loss


def their_loss(side: Theirs, batch: Sequence[Pair]) -> Any:
    """Compute the loss that ORPOTrainer differentiates."""
    inputs = side.trainer.data_collator([_columns(pair) for pair in batch])
    return side.trainer.get_batch_loss_metrics(side.model, inputs, train_eval="train")[0]


def _columns(pair: Pair) -> dict[str, Any]:
    prompt = pair[0].ids[: pair[0].prompt_tokens]
    columns: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, row in zip(("chosen", "rejected"), pair, strict=True):
        columns[f"{name}_input_ids"], columns[f"{name}_attention_mask"] = list(row.ids), [1] * row.tokens
        columns[f"{name}_labels"] = [-100] * row.prompt_tokens + list(row.ids[row.prompt_tokens :])
    return {**columns, "length": max(row.tokens for row in pair)}


def trainer_of(pairs: Sequence[Pair], folder: Path) -> Any:
    """Build a factory of ORPOTrainers on these pairs."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def make(model: Any, **arguments: Any) -> Any:
        given = {**COMMON, "beta": WEIGHT, "max_length": max(row.tokens for pair in pairs for row in pair), **arguments}
        trainer = ORPOTrainer(
            model=model,
            args=ORPOConfig(output_dir=str(folder), **given),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=AutoTokenizer.from_pretrained(ROOT / "models" / "tiny"),
        )
        trainer.train_dataset = Dataset.from_list([_columns(pair) for pair in pairs])  # its own maps are not measured
        return trainer

    return make


def main() -> None:
    """Run the benchmark and print its table."""
    given = parser_of(__doc__, 96, 96).parse_args()
    spin_while_waiting()
    quiet_libraries()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from tasks.train.batching import batches_of

    pairs = pairs_of(given.rows, given.prompt, given.reply, SHAPES[given.shape].vocabulary)
    needed = Needed.of_all([needed_of(pair) for pair in pairs])
    lengths = [sum(row.tokens for row in pair) for pair in pairs]
    batches = [[pairs[n] for n in batch] for batch in batches_of(0, lengths, BATCH_ROWS, 0)]
    with tempfile.TemporaryDirectory() as name:
        race = Race("ORPO", batches, needed, our_loss, their_loss, trainer_of(pairs, Path(name)))
        run(race, given, Path(name))


if __name__ == "__main__":
    main()
