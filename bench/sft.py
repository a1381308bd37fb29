"""Times SFT steps with LoRA against TRL's SFTTrainer on the same token ids, and compares losses and gradients.

    .venv/bin/python -m bench.sft [--shape tiny] [--dtype float32] [--rows 64] [--rounds 5] [--prompt 96] [--reply 96]

Random Llamas, random tokens, replies of a quarter to all of `--reply` tokens and prompts likewise. Anchors: SFTTrainer
as shipped ("default"), and without checkpointing, grouped by length, with its best batch size ("tuned"). Nothing else
should run meanwhile.
"""

from __future__ import annotations

import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.clock import ROOT
from bench.limits import SHAPES
from bench.operations import Needed
from bench.steps import BATCH_ROWS, COMMON, Race, Theirs, parser_of, random_tokens, run, spin_while_waiting, token_row
from tasks.core.stage import quiet_libraries
from tasks.inference.rows import TokenRow


def rows_of(count: int, prompt: int, reply: int, vocabulary: int) -> list[TokenRow]:
    """Build `count` rows of random tokens."""
    draw = random.Random(0)
    tokens = partial(random_tokens, draw, vocabulary=vocabulary)
    return [token_row(tokens(prompt), tokens(reply)) for _ in range(count)]


def needed_of(row: TokenRow) -> Needed:
    """Count the operations that a row needs."""
    return Needed.by(row.prompt_tokens, [row.scored_tokens], row.scored_tokens)


def our_loss(model: Any, batch: list[TokenRow]) -> Any:
    """Compute the stage's loss."""
    from tasks.inference.logprobs import score_tokens
    from tasks.train.objectives import sft_loss

    return sft_loss(score_tokens(model, batch).logp)


def their_loss(side: Theirs, batch: list[TokenRow]) -> Any:
    """Compute the loss that SFTTrainer differentiates."""
    inputs = side.trainer.data_collator([_labelled(row) for row in batch])
    return side.trainer.compute_loss(side.model, inputs)


def _labelled(row: TokenRow) -> dict[str, list[int]]:
    labels = [token if counts else -100 for token, counts in zip(row.ids, row.mask, strict=True)]
    return {"input_ids": list(row.ids), "labels": labels}


def trainer_of(rows: list[TokenRow], folder: Path) -> Any:
    """Build a factory of SFTTrainers on these rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def make(model: Any, **arguments: Any) -> Any:
        given = {**COMMON, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, **arguments}
        return SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(folder), **given),
            train_dataset=Dataset.from_list([_labelled(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(ROOT / "models" / "tiny"),
        )

    return make


def main() -> None:
    """Run the benchmark and print its table."""
    given = parser_of(__doc__, 96, 96).parse_args()
    spin_while_waiting()
    quiet_libraries()
    from tasks.train.batching import batches_of

    rows = rows_of(given.rows, given.prompt, given.reply, SHAPES[given.shape].vocabulary)
    needed = Needed.of_all([needed_of(row) for row in rows])
    batches = [[rows[n] for n in batch] for batch in batches_of(0, [row.tokens for row in rows], BATCH_ROWS, 0)]
    with tempfile.TemporaryDirectory() as name:
        race = Race("SFT", batches, needed, our_loss, their_loss, trainer_of(rows, Path(name)))
        run(race, given, Path(name))


if __name__ == "__main__":
    main()
