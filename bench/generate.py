"""Times generation against transformers' `generate` at its best batch size on the same prompts, and compares all texts.

    .venv/bin/python -m bench.generate [--shape tiny] [--dtype float32] [--prompts 128] [--rounds 5]

Random Llamas whose answers wander, since their weights are larger than those of training's begin; random prompts of 20
to 120 tokens; one token in forty ends an answer, of 128 tokens at most. Greedy. transformers gets the longest prompts
first, as lm-eval orders them, in batches of 4, 16 and 64 rows, of which the fastest is its own. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.clock import machine
from bench.evaluate import void
from bench.limits import SHAPES, write_base
from bench.steps import side_by_side, spin_while_waiting
from tasks.engine.memory import keep_freed_blocks
from tasks.models.device import upload

BATCHES = (4, 16, 64)
ROWS = 64
MOST = 128
ENDS = 40
"""One token of so many ends an answer."""


class Side:
    """One pass over all prompts; what was written is kept."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]], rows: int) -> None:
        self.model, self.prompts, self.rows = model, prompts, rows
        self.ends = list(range(5, model.config.vocab_size, ENDS))
        self.texts: list[list[int]] = []

    def __call__(self) -> float:
        """Run the pass; return its seconds."""
        started = time.perf_counter()
        self.texts = self.write()
        return time.perf_counter() - started

    def write(self) -> list[list[int]]:
        """Write every answer, up to its end token."""
        raise NotImplementedError


class Ours(Side):
    """Answers in a batch that rows join and leave."""

    def write(self) -> list[list[int]]:  # noqa: D102
        from tasks.inference.decoding import Asked, DecodingBatch, Written

        longest = max(map(len, self.prompts)) + MOST
        batch = DecodingBatch(self.model, self.ends, rows=self.rows, slab_rows=self.rows, shortest=longest)
        texts: list[list[int]] = [[] for _ in self.prompts]
        for number, prompt in enumerate(self.prompts):
            batch.ask(number, Asked(prompt, MOST))
        while batch.going or batch.waiting:
            for number, told in batch.step():
                if isinstance(told, Written):
                    texts[number].append(told.token)
        return texts


class Theirs(Side):
    """Answers by `generate`, batch after batch."""

    def write(self) -> list[list[int]]:  # noqa: D102
        import torch

        texts: list[list[int]] = [[]] * len(self.prompts)
        order = sorted(range(len(self.prompts)), key=lambda number: -len(self.prompts[number]))
        for start in range(0, len(order), self.rows):
            some = order[start : start + self.rows]
            longest = max(len(self.prompts[number]) for number in some)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            attended = torch.zeros_like(ids)
            for row, number in enumerate(some):
                ids[row, longest - len(self.prompts[number]) :] = torch.tensor(self.prompts[number])
                attended[row, longest - len(self.prompts[number]) :] = 1
            written = self.model.generate(
                input_ids=upload(ids, self.model.device),
                attention_mask=upload(attended, self.model.device),
                max_new_tokens=MOST,
                do_sample=False,
                eos_token_id=self.ends,
                pad_token_id=0,
            )[:, longest:].tolist()
            for number, row in zip(some, written, strict=True):
                stop = next((place for place, token in enumerate(row) if token in set(self.ends)), MOST - 1)
                texts[number] = row[: stop + 1]
        return texts


def main() -> None:
    """Print the machine and the table."""
    spin_while_waiting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    from tasks.inference.decoding import can_decode

    keep_freed_blocks()  # for both sides: they share a process
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), SHAPES[given.shape], torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype)).eval()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data.mul_(8)
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    prompts = [tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(20, 120))) for _ in range(given.prompts)]
    if not can_decode(model, max(map(len, prompts)) + MOST):
        raise SystemExit("this model cannot write in a batch that rows join and leave")
    took = {rows: Theirs(model, prompts, rows)() for rows in BATCHES}
    best = min(took, key=lambda rows: took[rows])
    ours, theirs = Ours(model, prompts, ROWS), Theirs(model, prompts, best)
    ratio = side_by_side(ours, theirs, given.rounds)
    tokens = sum(map(len, ours.texts))
    others = sum(one != other for one, other in zip(ours.texts, theirs.texts, strict=True))
    print("\n| setting | ratio, median | least | 90% interval | ours s | theirs s | in the same run |")
    print("|---" * 7 + "|")
    print(
        f"| {given.shape}, {given.dtype}, generate at {best} rows | {ratio.row()} | {others} of {len(prompts)} texts "
        f"differ, {tokens} tokens, {tokens / statistics.median(ratio.ours_s):.0f} tokens/s |"
    )
    control = side_by_side(ours, Ours(model, prompts, ROWS), given.rounds)
    print(f"| ours against ours{void(control)} | {control.row()} | |")


if __name__ == "__main__":
    main()
