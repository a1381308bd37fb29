"""One training: the model with its adapter, batches, losses and the loop, put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.attach import init_adapter, published_state
from tasks.adapters.params import AdaloraAdapter, FullAdapter
from tasks.core import ranks
from tasks.core.errors import BadInput, BadModel, Diverged
from tasks.core.progress import Progress
from tasks.engine.checkpoints import Stepper
from tasks.engine.evaluation_hooks import EvalHooks
from tasks.engine.loop import NOTHING, TrainingPlan, train_loop
from tasks.engine.loss_scale import LossScale, loss_scale
from tasks.engine.memory import AdaptiveMicroBatch, recompute_activations
from tasks.engine.schedules import learning_rates
from tasks.models.device import host_read, seed_everything
from tasks.models.loader import Model
from tasks.train import fsdp
from tasks.train.batching import all_batches, lengths_of, steps_per_epoch
from tasks.train.estimate.estimate import must_recompute
from tasks.train.estimate.meta_model import read_model_config
from tasks.train.examples import Example, parts_of, reference_sequences
from tasks.train.losses import StepLosses, fast_products, losses_for
from tasks.train.optimizers import optimizer_for
from tasks.train.params import Method, ReferringObjective
from tasks.train.reference_logprobs import Reference, precomputed
from tasks.train.throughput import Meter

if TYPE_CHECKING:
    from torch import Tensor


HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


class Training(NamedTuple):
    """A training, settled before its first step: nothing of its method is asked again.

    Attributes:
        model: the base with its adapter.
        parameters: what is trained, by name.
        losses: computes the losses of a step.
        plan: the course of its steps.
        optimizers: what changes the parameters at each step.
        tokens: how many each step goes through.
        micro_batch: the rows of a forward pass.
        scale: the factor of the loss, where gradients are computed in float16.
    """

    model: Model
    parameters: Mapping[str, Tensor]
    losses: StepLosses
    plan: TrainingPlan
    optimizers: Sequence[Stepper]
    tokens: Sequence[int]
    micro_batch: AdaptiveMicroBatch
    scale: LossScale | None


def prepare(
    base: Path,
    method: Method,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    checkpoints: Path,
    micro_batch: AdaptiveMicroBatch,
) -> Training:
    """Load the base, put a fresh adapter on it in the memory that there is, compute the reference, and plan the steps.

    Raises:
        BadModel: there is nothing to train.
    """
    seed_everything(method.seed)
    steps = method.epochs * steps_per_epoch(len(examples), method.batch_size)
    recomputing = micro_batch.recomputing(lambda: must_recompute(read_model_config(base), method, examples))
    model = init_adapter(base, method.adapter, steps)
    if recomputing:
        recompute_activations(model)
    if ranks.shards_weights():
        fsdp.shard_weights(model)
    reference = reference_for(model, examples, held_out, method, checkpoints)
    return plan_training(model, examples, method, micro_batch, reference)


def reference_for(
    model: Model, examples: Sequence[Example], held_out: Sequence[Example], method: Method, checkpoints: Path
) -> Reference | None:
    """Precompute an untrained model's reference for all that a training needs, where it is to be computed ahead."""
    if not isinstance(method.objective, ReferringObjective) or method.objective.reference != "precomputed":
        return None
    steps = ([examples[i] for i in chosen] for chosen in all_batches(lengths_of(examples), method))
    rows = reference_sequences(chain(steps, parts_of(held_out, method.batch_size)), method.objective)
    with fast_products(enabled=isinstance(method.adapter, FullAdapter)):
        return precomputed(model, rows, method.micro_batch_size, checkpoints / "reference")


def plan_training(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    micro_batch: AdaptiveMicroBatch,
    reference: Reference | None,
) -> Training:
    """Settle everything about a model's training by a method on these examples.

    Raises:
        BadModel: there is nothing to train.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise BadModel("the adapter has no trainable parameters", where="adapter", got=method.adapter.name)
    lengths = lengths_of(examples)
    batches = all_batches(lengths, method)
    losses = losses_for(model, examples, method, micro_batch, reference)
    plan = TrainingPlan(
        steps=len(batches),
        learning_rate=learning_rates(
            method.schedule, peak=method.learning_rate, warmup_steps=method.warmup_steps, steps=len(batches)
        ),
        losses=lambda step: losses.of_step([examples[i] for i in batches[step]]),
        describe=lambda step: [f"row {i} of the rendered training rows" for i in batches[step]],
        max_grad_norm=method.max_grad_norm,
        checkpoint_every_steps=method.checkpoint_every_steps,
    )
    optimizers: list[Stepper] = [optimizer_for(model, method)]
    if isinstance(method.adapter, AdaloraAdapter):
        from tasks.adapters.adalora import RankSteps

        optimizers.append(RankSteps(model))
    tokens = [sum(lengths[i] for i in rows) for rows in batches]
    return Training(model, parameters, losses, plan, optimizers, tokens, micro_batch, loss_scale())


def train(
    training: Training,
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    watch: EvalHooks = NOTHING,
) -> list[dict[str, Any]]:
    """Train the model's adapter in place; go on from the newest checkpoint. Return the log of the loop.

    `on_row` also gets what differs from run to run: speed and memory.
    """
    meter = Meter()

    def tell(row: dict[str, Any]) -> None:
        on_row(row | meter.since_last(training.tokens[row["step"] - 1]))

    return train_loop(
        training.plan,
        training.parameters,
        training.optimizers,
        checkpoints,
        progress,
        tell,
        watch,
        training.micro_batch,
        training.scale,
    )


def initial_state(model: Model) -> dict[str, Tensor]:
    """Copy the tensors that would be published now, for `check_outcome`."""
    return {name: tensor.clone() for name, tensor in published_state(model).items()}


def check_outcome(initial: Mapping[str, Tensor], model: Model, before: float, after: float) -> None:
    """Refuse to publish a training without a result.

    Raises:
        BadInput: the training changed nothing.
        Diverged: it ended much worse than it began: by more than a blind guess among all tokens loses, ln(vocabulary).
    """
    now = published_state(model)
    with host_read("whether anything was trained, at the end"):
        same = all(tensor.shape == initial[name].shape and tensor.equal(initial[name]) for name, tensor in now.items())
    if same:
        raise BadInput("the training changed nothing", where="train", fix="raise learning_rate")
    if not after - before < math.log(model.config.get_text_config().vocab_size):
        raise Diverged(
            "the training diverged; nothing was published",
            where="its end",
            got=f"a held-out loss of {after:.3f}, which was {before:.3f} before",
            fix="lower learning_rate or raise warmup_steps",
        )
