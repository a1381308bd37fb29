"""The optimisation loop of pretraining and tuning: stopped anywhere and resumed, it gives the same bits.

It stops at the first loss or gradient that is not finite, before the optimizer sees it; it writes a checkpoint every
so many steps, at the end, and when a signal asks it to stop; and it returns only if it took every step, or stopped
early by its rule.

Where gradients are computed in float16 the loss is scaled (tasks/engine/loss_scale.py). A step whose gradients overflow
then is skipped: its rows are gone through, the optimizer is not asked, and the log says so. That is no divergence as
long as the loss is a number and a smaller scale is left to try.

Where several processes train, each differentiates its parts of a step; all then take the same step, and the first one
keeps what is written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tasks.core.errors import BadModel, Diverged, Interrupted
from tasks.core.progress import Progress
from tasks.core.ranks import is_first
from tasks.core.signals import on_stop
from tasks.engine.checkpoints import (
    Checkpoint,
    Stepper,
    check_structure,
    check_writable,
    latest,
    pack_tensors,
    random_state,
    save,
    set_random_state,
    structure_of,
    unpack_tensors,
)
from tasks.engine.collectives import all_reduce, any_rank, barrier, check_agreed, rank_rng, sum_gradients
from tasks.engine.evaluation_hooks import EvalHooks
from tasks.engine.loss_scale import LossScale
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.models.device import COMPUTE_DTYPE, host_read
from tasks.reports.training_log import HELD_OUT_LOSS, best_step

if TYPE_CHECKING:
    from torch import Tensor

NOTHING = EvalHooks()
"""Nothing is looked at, and every step is taken."""
AS_THEY_ARE = AdaptiveMicroBatch(1, fit=False)
"""A step takes its rows as it does; when memory runs out, that is the end."""


@dataclass(frozen=True)
class TrainingPlan:
    """Course of a training; every field is a fixed function of the step, counted from 0.

    Attributes:
        steps: the number of steps.
        learning_rate: the rate at a step.
        losses: the loss to differentiate at a step, in parts that add up to it, each with its share of what is logged:
            scalars, which stay on the device until the step is over.
        describe: names the rows of a step, for errors.
        max_grad_norm: gradients are scaled down to this norm.
        checkpoint_every_steps: how much work a kill may cost.
    """

    steps: int
    learning_rate: Callable[[int], float]
    losses: Callable[[int], Iterable[tuple[Tensor, Mapping[str, Tensor]]]]
    describe: Callable[[int], Sequence[str]]
    max_grad_norm: float
    checkpoint_every_steps: int


@runtime_checkable
class Averaging(Protocol):
    """An optimizer whose result is an average of its steps: what is trained on and what is published differ."""

    def train(self) -> None:
        """Set the parameters to those that are trained on."""

    def eval(self) -> None:
        """Set the parameters to those that are published."""


def train_loop(
    course: TrainingPlan,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Stepper],
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    watch: EvalHooks = NOTHING,
    rows: AdaptiveMicroBatch = AS_THEY_ARE,
    scale: LossScale | None = None,
) -> list[dict[str, Any]]:
    """Train `parameters` in place, going on from the newest whole checkpoint, and leave there what is to be kept.

    It takes every step, unless `watch` stops it early.

    Args:
        course: the steps.
        parameters: what is trained, by name.
        optimizers: all of them step at every step.
        checkpoints: the folder of this training's.
        progress: counts the steps.
        on_row: gets every row of the log as it comes.
        watch: what is measured on the way, and what follows from it.
        rows: the rows that the losses of a step take at once, which may be reduced.
        scale: the factor of the loss, for gradients in float16; None: the loss is differentiated as it is.

    Returns:
        The log: for every step its number from 1, loss, gradient norm, learning rate, what `course.losses` adds, and
        what was measured. With a scale also `loss_scale`, by which the step's loss was multiplied, and `skipped`, 1 if
        its gradients overflowed, else 0; those have no norm.

    Raises:
        BadData: the checkpoint is of another training.
        BadInput: no checkpoint can be written.
        Diverged: a loss or gradient is not finite, the gradient at any scale; checkpoints before it stay.
        Interrupted: a signal asked it to stop; a checkpoint was written first.
    """
    check_writable(checkpoints)
    stateful = [*optimizers, scale] if scale else optimizers
    log, best = _resume(course, parameters, stateful, checkpoints, progress)
    over = len(log) == course.steps or watch.is_over(log)
    with stop_signals() as stopping:
        while not over:
            row = _step(course, len(log), parameters, optimizers, rows, scale)
            with _published(parameters, optimizers):
                row |= _finite(watch.look(row["step"], course.steps), row["step"])
                log.append(row)
                if watch.keep_best and HELD_OUT_LOSS in row and best_step(log) == row["step"]:
                    best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            on_row(row)
            progress.step(f"loss {row['loss']:.3f}")
            over = len(log) == course.steps or watch.is_over(log)
            stop = any_rank(stopping.is_set())
            if len(log) % course.checkpoint_every_steps == 0 or over or stop:
                _check_finite(parameters, len(log))
                if is_first():
                    save(
                        checkpoints,
                        Checkpoint(len(log), pack_tensors(parameters, stateful, best), log, structure_of(stateful)),
                    )
                barrier()  # else the end of one process would end the first while it writes
            if stop and not over:
                raise Interrupted(
                    "the training was stopped",
                    where=f"step {len(log)} of {course.steps}",
                    fix="run it again: it goes on from here",
                )
    _leave(parameters, optimizers, best)
    return log


def _resume(
    course: TrainingPlan,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Stepper],
    checkpoints: Path,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Restore everything from the newest checkpoint; return the log and the best weights so far."""
    log, best = list[dict[str, Any]](), dict[str, Any]()
    found = latest(checkpoints)
    check_agreed("the newest checkpoint", found.step if found else 0, fix=f"let all machines see {checkpoints}")
    if found:
        check_structure(found, optimizers, str(checkpoints))
        best = unpack_tensors(found.tensors, parameters, optimizers, str(checkpoints))
        log = found.log
        print(f"{progress.label}: going on from the checkpoint after step {found.step} of {course.steps}", flush=True)
        progress.go_on_from(found.step)
    for optimizer in optimizers:
        if isinstance(optimizer, Averaging):
            optimizer.train()
    return log, best


def _step(
    course: TrainingPlan,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Stepper],
    rows: AdaptiveMicroBatch,
    scale: LossScale | None,
) -> dict[str, Any]:
    """Take one step, or skip it if its scaled gradients overflow; return its row of the log."""
    import torch

    rate, random = course.learning_rate(step), random_state()

    def differentiate() -> dict[str, Tensor]:
        set_random_state(random)  # a step that is taken again draws what it drew
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with rank_rng():
            return _differentiate(course.losses(step), scale)

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    sums = rows.fitted(differentiate)
    sum_gradients(parameters.values())
    total = all_reduce(torch.stack([*sums.values()]))
    if scale:
        scale.unscale(parameters.values())
    of_gradient = torch.nn.utils.clip_grad_norm_(list(parameters.values()), course.max_grad_norm)
    with host_read("a step's numbers, all at once, before the optimizer takes it"):
        loss, *others, norm = torch.cat([total, of_gradient.to(total)[None]]).tolist()
    overflowed = not math.isfinite(norm)
    if not math.isfinite(loss) or (overflowed and (scale is None or scale.is_least)):
        lower = "lower learning_rate or raise warmup_steps"
        raise Diverged(
            "the training diverged; nothing was published",
            where=f"step {step + 1} of {course.steps}",
            got=f"loss {loss}, gradient norm {norm}{f', loss scale {scale.factor:g}' if scale else ''}",
            examples=course.describe(step),
            fix=f"set {COMPUTE_DTYPE}=float32, as this model may overflow in float16; or {lower}" if scale else lower,
        )
    row: dict[str, Any] = {"step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate}
    row |= dict(zip([*sums][1:], others, strict=True))
    if scale:
        row |= {"loss_scale": scale.factor, "skipped": int(overflowed)}
        scale.update(finite=not overflowed)
    if overflowed:
        del row["grad_norm"]
        return row
    for optimizer in optimizers:
        optimizer.step()
    return row


def _differentiate(parts: Iterable[tuple[Tensor, Mapping[str, Tensor]]], scale: LossScale | None) -> dict[str, Tensor]:
    """Add the gradients of all parts, each before the next is computed; return sums of `loss` and log in float64."""
    sums = dict[str, Any]()
    for part, logged in parts:
        if not part.requires_grad:
            raise BadModel(
                "what this model gives does not depend on what is trained of it",
                where="train.*.adapter",
                fix="choose other modules or layers, or another base",
            )
        (part * scale.factor if scale else part).backward()
        for name, value in {"loss": part, **logged}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    return sums


@contextmanager
def _published(parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper]) -> Iterator[None]:
    """Make the parameters what would be published within this block; after it, to the bit what they were."""
    import torch

    averaging = [optimizer for optimizer in optimizers if isinstance(optimizer, Averaging)]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()} if averaging else {}
    for optimizer in averaging:
        optimizer.eval()
    yield
    for optimizer in averaging:
        optimizer.train()
    with torch.no_grad():  # there and back again would round
        for name, tensor in before.items():
            parameters[name].copy_(tensor)


def _leave(parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper], best: Mapping[str, Tensor]) -> None:
    """Set the parameters to what is to be kept."""
    import torch

    for optimizer in optimizers:
        if isinstance(optimizer, Averaging):
            optimizer.eval()
    with torch.no_grad():
        for name, tensor in best.items():
            parameters[name].copy_(tensor)


def _finite(seen: dict[str, Any], step: int) -> dict[str, Any]:
    """Check that the measured held-out loss is a number; return what was measured."""
    if not math.isfinite(seen.get(HELD_OUT_LOSS, 0.0)):
        raise Diverged(
            "the training diverged; nothing was published",
            where=f"step {step}",
            got=f"a held-out loss of {seen[HELD_OUT_LOSS]}",
            fix="lower learning_rate or raise warmup_steps",
        )
    return seen


def _check_finite(parameters: Mapping[str, Tensor], step: int) -> None:
    """Refuse weights that the last update made infinite or NaN: the loss would show it only at the next step."""
    import torch

    with host_read("whether weights are finite, before they are written"):
        finite = torch.stack([parameter.isfinite().all() for parameter in parameters.values()]).tolist()
    broken = [name for name, is_finite in zip(parameters, finite, strict=True) if not is_finite]
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
    """Let the signals that ask to stop only set the event within this block, so that a step can end and be saved."""
    stopping = threading.Event()
    with on_stop(lambda *_: stopping.set()):
        yield stopping
