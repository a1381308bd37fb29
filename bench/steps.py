"""Training steps side by side with TRL 1.16: bases of a known shape, the limit of the machine, ours and the anchors.

Everything starts from the same random weights, the same first adapter and the same token ids. What is measured
is one pass over all rows by the whole trainer, from the beginning of its first step to the end of its last; what comes
before (datasets, optimizers, loaders) is not counted for anyone.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bench.clock import Ratio, machine
from bench.limits import SHAPES, peak_bytes, write_base
from bench.operations import Needed, operations_of, peak_flops
from tasks.engine.memory import keep_freed_blocks, set_malloc_option
from tasks.inference.rows import TokenRow
from tasks.models.device import choices

RANK = 8
BATCH_ROWS = 8
CURVE_STEPS = 20


def adapted(folder: Path, dtype: Any) -> Any:
    """Load the benchmark's model with a new LoRA adapter whose two matrices are both random, in training mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.adapters.attach import make_trainable
    from tasks.adapters.params import LoraAdapter

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    torch.manual_seed(1)
    adapter = LoraAdapter(name="lora", rank=RANK, alpha=2.0 * RANK, dropout=0.0, targets="all-linear")
    model = make_trainable(base, adapter).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.02
    return model


# --- both sides -------------------------------------------------------------------------------------------------------


class Side:
    """A model that is trained from the same start again and again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.learns = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._first = {name: p.detach().clone() for name, p in self.learns.items()}

    def again(self) -> None:
        """Back to the start."""
        import torch

        for name, parameter in self.learns.items():
            with torch.no_grad():  # not through .data, whose changes rotations would not notice
                parameter.copy_(self._first[name])
            parameter.grad = None

    def optimizer(self) -> Any:
        """Build the optimizer of both while their losses are compared, and of ours always: the stage's AdamW."""
        import torch

        fused = choices(self.model.device).fused_optimizer or None
        return torch.optim.AdamW(list(self.learns.values()), lr=1e-4, weight_decay=0.0, fused=fused)

    def gradients(self, loss: Any) -> list[Any]:
        """Compute the gradients of a loss, by parameter."""
        self.model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in self.learns.values()]


def finish(model: Any) -> None:
    """Wait until a model's device has done all that it was asked for."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def give_back_freed_memory() -> None:
    """Set the memory limits that glibc comes to by itself: map above 32 MiB, give back above 64 MiB."""
    set_malloc_option(mmap_max=65_536, mmap_threshold=32 << 20, trim_threshold=64 << 20)


class Ours(Side):
    """Batches trained as the stage `train` does it."""

    def __init__(self, model: Any, batches: Sequence[Any], loss: Callable[[Any, Any], Any]) -> None:
        super().__init__(model)
        self.batches, self._loss = batches, loss

    def loss(self, batch: Any) -> Any:
        """Compute the objective's loss, to be differentiated."""
        return self._loss(self.model, batch)

    def __call__(self) -> float:
        """Run one pass over all batches; return its seconds."""
        import torch

        self.again()
        keep_freed_blocks()  # as the stage does
        optimizer = self.optimizer()
        finish(self.model)
        started = time.perf_counter()
        for batch in self.batches:
            optimizer.zero_grad()
            self.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(list(self.learns.values()), 1.0)
            optimizer.step()
        finish(self.model)
        return time.perf_counter() - started


class Theirs(Side):
    """A trainer of TRL's on the same rows; `make` gets the model and the arguments that differ.

    `allocator` sets how memory is asked for: as for ours unless it says otherwise.
    """

    def __init__(
        self,
        model: Any,
        make: Callable[..., Any],
        allocator: Callable[[], None] = keep_freed_blocks,
        **arguments: Any,
    ) -> None:
        super().__init__(model)
        self._allocator = allocator
        from transformers import PrinterCallback

        self.trainer = make(self.model, **arguments)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self._clock)

    @cached_property
    def _clock(self) -> Any:
        from transformers import TrainerCallback

        model = self.model

        class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
            started = ended = 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.started = self.started or time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step >= state.max_steps:
                    finish(model)
                self.ended = time.perf_counter()

        return Clock()

    def __call__(self) -> float:
        """Run one epoch of the trainer's own loop; return its seconds."""
        self.again()
        self.trainer.optimizer = self.trainer.lr_scheduler = None
        self._clock.started = 0.0
        self._allocator()
        self.trainer.train()
        seconds: float = self._clock.ended - self._clock.started
        return seconds


COMMON: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "num_train_epochs": 1,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "learning_rate": 1e-4,
    "per_device_train_batch_size": BATCH_ROWS,
}
"""What every anchor gets: only what it needs to run here, and to stay silent."""

TUNED: dict[str, Any] = {
    "gradient_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "bf16": False,  # the weights have the type that is asked for; autocast would only cast again
}


def anchors(folder: Path, dtype: Any, make: Callable[..., Any]) -> Iterator[tuple[str, Theirs]]:
    """Yield the trainer as shipped, and with the fastest of three batch sizes; the rows of a step stay the same."""
    import torch

    yield "default", Theirs(adapted(folder, dtype), make, give_back_freed_memory, bf16=dtype == torch.bfloat16)
    best: tuple[float, Theirs] | None = None
    for rows in (BATCH_ROWS, BATCH_ROWS // 2, BATCH_ROWS // 4):
        sizes: dict[str, Any] = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": BATCH_ROWS // rows}
        side = Theirs(adapted(folder, dtype), make, **TUNED, **sizes)
        seconds = side()
        if best is None or seconds < best[0]:
            best = seconds, side
    assert best
    yield "tuned", best[1]


def side_by_side(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Ratio:
    """Both by turns, each telling its own seconds; who begins changes from round to round."""
    ours()
    theirs()
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for mine in (True, False) if number % 2 else (False, True):
            gc.collect()
            times[mine].append((ours if mine else theirs)())
    ratios = [other / own for own, other in zip(times[True], times[False], strict=True)]
    return Ratio(ratios, times[True], times[False])


def same(ours: Ours, theirs: Theirs, their_loss: Callable[[Any, Any], Any], batch: Any) -> str:
    """Measure the relative difference of losses and gradients of a batch."""
    ours.again()
    theirs.again()
    mine = ours.loss(batch)
    other = their_loss(theirs, batch)
    pairs = zip(ours.gradients(mine), theirs.gradients(other), strict=True)
    apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return f"loss {abs(mine.item() / other.item() - 1):.1e}, gradients {apart:.1e}"


def curves(ours: Ours, theirs: Theirs, their_loss: Callable[[Any, Any], Any]) -> str:
    """Measure the largest relative difference of the losses of twenty steps on the same batches."""
    worst, sides = 0.0, (ours, theirs)
    for side in sides:
        side.again()
    optimizers = [side.optimizer() for side in sides]
    for step in range(CURVE_STEPS):
        batch = ours.batches[step % len(ours.batches)]
        losses = [ours.loss(batch), their_loss(theirs, batch)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        worst = max(worst, abs(losses[0].item() / losses[1].item() - 1))
    return f"{CURVE_STEPS} steps {worst:.1e}"


def report(name: str, ours: Ours, sides: Iterator[tuple[str, Theirs]], needed: Needed, rounds: int) -> Iterator[str]:
    """Yield the table rows of a setting: each anchor, the control, the fraction of the limit."""
    before = peak_flops(ours.model)
    held = peak_bytes(lambda: ours.loss(ours.batches[0]).backward())
    for label, theirs in sides:
        ratio = side_by_side(ours, theirs, rounds)
        theirs.trainer.args.max_steps = 1
        ratio_of_bytes = peak_bytes(theirs) / held
        theirs.trainer.args.max_steps = -1
        yield f"| {name}, TRL {label} | {ratio.row()} | {ratio_of_bytes:.1f} |"
    control = side_by_side(ours, ours, rounds)
    limit = statistics.median([before, peak_flops(ours.model)])
    reached = operations_of(ours.model).of(needed) / statistics.median(control.ours_s) / limit
    void = "" if 0.97 <= statistics.median(control.ratios) <= 1.03 else " VOID: outside 0.97 to 1.03"
    yield f"| {name}, ours against ours{void} | {control.row()} | fraction of the limit {reached:.2f} |"


def random_tokens(draw: random.Random, most: int, vocabulary: int) -> list[int]:
    """Draw a quarter of `most` random tokens to all of them."""
    return exactly(draw, draw.randint(max(1, most // 4), most), vocabulary)


def exactly(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    """Draw `count` random tokens."""
    return [draw.randrange(3, vocabulary) for _ in range(count)]


def token_row(prompt: Sequence[int], reply: Sequence[int]) -> TokenRow:
    """Build a row of a prompt and a reply that is trained on."""
    return TokenRow([*prompt, *reply], [False] * len(prompt) + [True] * len(reply), len(prompt))


def spin_while_waiting() -> None:
    """Lets idle threads spin on both sides, as they do by default; stages leave cores to each other."""
    os.environ |= {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}


def parser_of(description: str | None, prompt: int, reply: int) -> argparse.ArgumentParser:
    """Build the argument parser that both benchmarks of steps share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=prompt)
    parser.add_argument("--reply", type=int, default=reply)
    return parser


class Race(NamedTuple):
    """A benchmark: what it is called, its batches, what of them is needed, both losses, what makes their trainers."""

    name: str
    batches: Sequence[Any]
    needed: Needed
    our_loss: Callable[[Any, Any], Any]
    their_loss: Callable[[Any, Any], Any]
    make: Callable[..., Any]


def run(race: Race, given: argparse.Namespace, folder: Path) -> None:
    """Compare losses first, then measure times; print both."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_flush_denormal(True)
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    dtype, base = getattr(torch, given.dtype), folder / "base"
    write_base(base, SHAPES[given.shape], torch.float32)
    plain: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False}
    exact = Ours(adapted(base, torch.float32), race.batches, race.our_loss)
    theirs = Theirs(adapted(base, torch.float32), race.make, **plain)
    print(f"float32, relatively: {same(exact, theirs, race.their_loss, race.batches[0])}")
    ours = Ours(adapted(base, dtype), race.batches, race.our_loss)
    theirs = Theirs(adapted(base, dtype), race.make, **plain)
    print(f"{given.dtype}, relatively: {curves(ours, theirs, race.their_loss)}")
    del exact, theirs
    print("\n| setting | ratio, median | least | 90% interval | ours s | theirs s | their memory / ours |")
    print("|---" * 7 + "|")
    setting = f"{race.name}, {given.shape}, {given.dtype}"
    for line in report(setting, ours, anchors(base, dtype, race.make), race.needed, given.rounds):
        print(line, flush=True)
