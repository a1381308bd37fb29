"""Cost of a token in longer and longer rows, and memory of the loss for larger and larger vocabularies.

    .venv/bin/python -m bench.lengths [--shape tiny] [--dtype float32] [--longest 16384] [--rounds 3]

One row a step for SFT, half of it reply; one pair a step for ORPO, prompt and replies of a third each. Attention to
all that stands before grows with the length: `needed` is how many operations a token then takes, so that time per
operation is what must stay level. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import orpo, sft
from bench.clock import machine
from bench.limits import SHAPES, peak_bytes, write_base
from bench.operations import Needed, operations_of, peak_flops
from bench.steps import Ours, adapted, exactly, spin_while_waiting, token_row
from tasks.core.stage import quiet_libraries
from tasks.engine.memory import keep_freed_blocks

SHORTEST = 1024
VOCABULARIES = (8192, 32_768, 131_072)
LOSS_TOKENS, HIDDEN = 2048, 192


def sft_step(tokens: int, some: Callable[[int], list[int]]) -> tuple[list[Any], Needed]:
    """Build a step of one SFT row, and count the operations it needs."""
    row = token_row(some(tokens // 2), some(tokens - tokens // 2))
    return [row], sft.needed_of(row)


def orpo_step(tokens: int, some: Callable[[int], list[int]]) -> tuple[list[Any], Needed]:
    """Build a step of one ORPO pair whose prompt stands once, and count the operations it needs."""
    prompt, reply = some(tokens - 2 * (tokens // 3)), tokens // 3
    pair = token_row(prompt, some(reply)), token_row(prompt, some(reply))
    return [pair], orpo.needed_of(pair)


def rows_of_lengths(given: argparse.Namespace, folder: Path, dtype: Any) -> None:
    """Print the table over lengths."""
    some = partial(exactly, random.Random(0), vocabulary=SHAPES[given.shape].vocabulary)
    print("\n| objective | tokens | s | us a token | needed, MFLOP a token | fraction of the limit | KiB a token |")
    print("|---" * 7 + "|")
    for name, step_of, loss in (("SFT", sft_step, sft.our_loss), ("ORPO", orpo_step, orpo.our_loss)):
        tokens = SHORTEST
        while tokens <= given.longest:
            step, needed = step_of(tokens, some)
            ours = Ours(adapted(folder, dtype), [step], loss)
            ours()
            seconds = statistics.median(ours() for _ in range(given.rounds))
            flops, limit = operations_of(ours.model).of(needed), peak_flops(ours.model)
            held = peak_bytes(partial(_differentiated, ours))
            print(
                f"| {name} | {tokens} | {seconds:.2f} | {seconds / tokens * 1e6:.0f} | {flops / tokens / 1e6:.0f} | "
                f"{flops / seconds / limit:.2f} | {held / tokens / 1024:.1f} |",
                flush=True,
            )
            tokens *= 2


def _differentiated(ours: Ours) -> None:
    ours.loss(ours.batches[0]).backward()


def held_by_loss(vocabulary: int, dtype: Any) -> int:
    """Measure the bytes that the head and the loss of random hidden states hold, forwards and backwards."""
    import torch

    from tasks.inference.linear_cross_entropy import Head, score_targets

    weight = torch.randn(vocabulary, HIDDEN, dtype=dtype)
    hidden = torch.randn(LOSS_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (LOSS_TOKENS,))
    return peak_bytes(lambda: score_targets(hidden, Head(weight), targets).logp.mean().backward())


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--longest", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    spin_while_waiting()
    quiet_libraries()
    import torch

    torch.set_flush_denormal(True)
    keep_freed_blocks()
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    dtype = getattr(torch, given.dtype)
    with tempfile.TemporaryDirectory() as name:
        write_base(Path(name), SHAPES[given.shape], torch.float32)
        rows_of_lengths(given, Path(name), dtype)
    print(f"\n| vocabulary | the loss of {LOSS_TOKENS} tokens holds, MiB | all their logits would, MiB |")
    print("|---" * 3 + "|")
    for vocabulary in VOCABULARIES:
        logits = LOSS_TOKENS * vocabulary * 4
        print(f"| {vocabulary} | {held_by_loss(vocabulary, dtype) / 2**20:.1f} | {logits / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
