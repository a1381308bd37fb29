"""Trainings in one line: what the stage settles before the first step, on a model and rows that a test has at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.core.progress import Progress
from tasks.engine.evaluation_hooks import EvalHooks
from tasks.engine.loop import NOTHING
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.models.loader import Model
from tasks.train import trainer
from tasks.train.examples import Example
from tasks.train.losses import StepLosses, losses_for
from tasks.train.params import Method
from tasks.train.reference_logprobs import Reference


def train(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    reference: Reference | None = None,
    watch: EvalHooks = NOTHING,
) -> list[dict[str, Any]]:
    """Trains a model that has its adapter by a method on some examples."""
    reference = reference or trainer.reference_for(model, examples, (), method, checkpoints)
    training = trainer.plan_training(model, examples, method, _rows(method), reference)
    return trainer.train(training, checkpoints, progress, on_row, watch)


def losses_of(
    model: Model, examples: Sequence[Example], method: Method, reference: Reference | None = None
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The losses of one step, in parts of `micro_batch_size`, each with what is logged, read."""
    for loss, logged in _losses(model, examples, method, reference).of_step(examples):
        yield loss, {name: value.item() for name, value in logged.items()}


def loss_of(
    model: Model, examples: Sequence[Example], method: Method, reference: Reference | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The objective alone on all examples of a step at once, without AdaLoRA's penalty."""
    together = method.model_copy(update={"micro_batch_size": len(examples)})
    ((loss, logged, _),) = _losses(model, examples, together, reference)._parts(examples)
    return loss, {name: value.item() for name, value in logged.items()}


def held_out_loss(
    model: Model, examples: Sequence[Example], method: Method, reference: Reference | None = None
) -> float:
    """The objective's mean over held-out examples, in steps of `batch_size`."""
    return _losses(model, examples, method, reference).held_out(examples, method.batch_size)


def _losses(model: Model, examples: Sequence[Example], method: Method, reference: Reference | None) -> StepLosses:
    alone = method.model_copy(update={"epochs": 1})  # nothing is needed again, so that nothing is kept
    return losses_for(model, examples, alone, _rows(method), reference)


def _rows(method: Method) -> AdaptiveMicroBatch:
    return AdaptiveMicroBatch(method.micro_batch_size, fit=method.fit_memory)
