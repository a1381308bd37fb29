"""The optimisation loop of pretraining and tuning: stopped anywhere and resumed, it gives the same bits.

It stops at the first loss or gradient that is not finite, before the optimizer sees it; it writes a checkpoint every
so many steps, at the end, and when a signal asks it to stop; and it returns only if it took every step.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.checkpoints import Checkpoint, Stepper, latest, pack, save, unpack
from tasks.errors import Diverged, Interrupted
from tasks.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Course:
    """What a training does at each step; every field is a fixed function of the step, counted from 0.

    Attributes:
        steps: how many there are.
        learning_rate: the rate at a step.
        losses: the loss to differentiate at a step, in parts that add up to it, each with its share of what is logged.
        describe: names the rows of a step, for errors.
        max_grad_norm: gradients are scaled down to this norm.
        checkpoint_every_steps: how much work a kill may cost.
    """

    steps: int
    learning_rate: Callable[[int], float]
    losses: Callable[[int], Iterable[tuple[Tensor, dict[str, float]]]]
    describe: Callable[[int], Sequence[str]]
    max_grad_norm: float
    checkpoint_every_steps: int


def run(
    course: Course,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Stepper],
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Trains `parameters` in place, going on from the newest whole checkpoint.

    Returns:
        The log: for every step its number from 1, loss, gradient norm, learning rate, and what `course.losses` adds.

    Raises:
        Diverged: a loss or gradient is not finite; checkpoints before it stay.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written first.
    """
    import torch

    log: list[dict[str, Any]] = []
    if found := latest(checkpoints):
        unpack(found.tensors, parameters, optimizers)
        log = found.log
        print(f"{progress.label}: going on from the checkpoint after step {found.step} of {course.steps}", flush=True)
        progress.go_on_from(found.step)
    with stop_signals() as stopping:
        for step in range(len(log), course.steps):
            rate = course.learning_rate(step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
            loss, extra = _differentiate(course.losses(step))
            norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), course.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    "the training diverged; nothing was published",
                    where=f"step {step + 1} of {course.steps}",
                    got=f"loss {loss}, gradient norm {norm}",
                    examples=course.describe(step),
                    fix="lower learning_rate or raise warmup_steps",
                )
            for optimizer in optimizers:
                optimizer.step()
            log.append({"step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate, **extra})
            on_row(log[-1])
            progress.step(f"loss {loss:.3f}")
            due = (step + 1) % course.checkpoint_every_steps == 0 or step + 1 == course.steps
            if due or stopping.is_set():
                _check_finite(parameters, step + 1)
                save(checkpoints, Checkpoint(step + 1, pack(parameters, optimizers), log))
            if stopping.is_set() and step + 1 < course.steps:
                raise Interrupted(
                    "the training was stopped",
                    where=f"step {step + 1} of {course.steps}",
                    fix="run it again: it goes on from here",
                )
    return log


def _differentiate(parts: Iterable[tuple[Tensor, dict[str, float]]]) -> tuple[float, dict[str, float]]:
    """Adds the gradients of all parts, each before the next is computed; returns the sums of what they say."""
    total, extra = 0.0, dict[str, float]()
    for part, logged in parts:
        part.backward()
        total += part.item()
        extra = {name: extra.get(name, 0.0) + value for name, value in logged.items()}
    return total, extra


def _check_finite(parameters: Mapping[str, torch.Tensor], step: int) -> None:
    """Refuses weights that the last update made infinite or NaN: the loss would tell only at the next step."""
    broken = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
    if broken:
        raise Diverged(
            "the training diverged; nothing was published",
            where=f"step {step}",
            got="weights that are not finite",
            examples=broken,
            fix="lower learning_rate or raise warmup_steps",
        )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within this block SIGTERM and SIGINT only set the event, so that a step can end and be saved."""
    stopping = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stopping.set()) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def schedule(step: int, steps: int, *, peak: float, warmup_steps: int, shape: str) -> float:
    """The learning rate at a step: a linear warm-up to `peak`, then `constant`, or `linear` or `cosine` to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
