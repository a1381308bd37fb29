"""One training: the model with its adapter, batches, losses and the loop, put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.attach import init_adapter, published_state
from tasks.adapters.params import AdaloraAdapter
from tasks.core import ranks
from tasks.core.errors import BadInput, BadModel, Diverged
from tasks.core.progress import Progress
from tasks.engine.checkpoints import Stepper
from tasks.engine.evaluation_hooks import EvalHooks
from tasks.engine.loop import NOTHING, TrainingPlan, schedule, train_loop
from tasks.engine.memory import AdaptiveMicroBatch, recompute_activations
from tasks.models.device import seed_everything
from tasks.models.loader import Model
from tasks.train import fsdp
from tasks.train.batching import all_batches, lengths_of, steps_per_epoch
from tasks.train.estimate.estimate import must_recompute
from tasks.train.estimate.meta_model import read_model_config
from tasks.train.examples import Example, parts_of, reference_sequences
from tasks.train.losses import fast_products, frozen_layer_cache_for, held_out_loss, losses_of
from tasks.train.optimizers import optimizer_for
from tasks.train.params import Method, ReferringObjective, WarmupStableDecay
from tasks.train.reference_logprobs import Reference, precomputed
from tasks.train.throughput import Meter

if TYPE_CHECKING:
    from torch import Tensor


HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


class Prepared(NamedTuple):
    """A training before its first step.

    Attributes:
        model: the base with a fresh adapter.
        steps: how many will be taken.
        reference: of objectives that need one ahead.
        initial: copies of the tensors that would be published now.
        loss: computes the held-out loss of the model as it is, nats per token.
    """

    model: Model
    steps: int
    reference: Reference | None
    initial: Mapping[str, Tensor]
    loss: Callable[[], float]


def prepare(
    base: Path,
    method: Method,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    checkpoints: Path,
    rows: AdaptiveMicroBatch,
) -> Prepared:
    """Load the base, put a fresh adapter on it in the memory that there is, and compute the reference."""
    seed_everything(method.seed)
    steps = method.epochs * steps_per_epoch(len(examples), method.batch_size)
    recomputing = rows.recomputing(lambda: must_recompute(read_model_config(base), method, examples))
    model = init_adapter(base, method.adapter, steps)
    if recomputing:
        recompute_activations(model)
    if ranks.shards_weights():
        fsdp.shard(model)
    reference = reference_for(model, examples, held_out, method, checkpoints)
    initial = {name: tensor.clone() for name, tensor in published_state(model).items()}

    def loss() -> float:
        return rows.fitted(lambda: held_out_loss(model, held_out, taking(method, rows), reference))

    return Prepared(model, steps, reference, initial, loss)


def reference_for(
    model: Model, examples: Sequence[Example], held_out: Sequence[Example], method: Method, checkpoints: Path
) -> Reference | None:
    """Precompute an untrained model's reference for all that a training needs, where it is to be computed ahead."""
    if not isinstance(method.objective, ReferringObjective) or method.objective.reference != "precomputed":
        return None
    steps = ([examples[i] for i in chosen] for chosen in all_batches(lengths_of(examples), method))
    rows = reference_sequences(chain(steps, parts_of(held_out, method.batch_size)), method)
    with fast_products(method):
        return precomputed(model, rows, method.micro_batch_size, checkpoints / "reference")


def train(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    reference: Reference | None = None,
    watch: EvalHooks = NOTHING,
    rows: AdaptiveMicroBatch | None = None,
) -> list[dict[str, Any]]:
    """Train the model's adapter in place; go on from the newest checkpoint. Return the log of the loop.

    `on_row` also gets what differs from run to run: speed and memory. `reference` is made here where it is missing.

    Raises:
        BadModel: there is nothing to train.
    """
    reference = reference or reference_for(model, examples, (), method, checkpoints)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise BadModel("the adapter has no trainable parameters", where="adapter", got=method.adapter.name)
    lengths = lengths_of(examples)
    chosen = all_batches(lengths, method)
    steps = len(chosen)
    below = frozen_layer_cache_for(model, examples, method)
    at_once = rows or AdaptiveMicroBatch(method.micro_batch_size, fit=method.fit_memory)

    course = TrainingPlan(
        steps=steps,
        learning_rate=lambda step: learning_rate(step, steps, method),
        losses=lambda step: losses_of(
            model, [examples[i] for i in chosen[step]], taking(method, at_once), below, reference
        ),
        describe=lambda step: [f"row {i} of the rendered training rows" for i in chosen[step]],
        max_grad_norm=method.max_grad_norm,
        checkpoint_every_steps=method.checkpoint_every_steps,
    )
    steppers: list[Stepper] = [optimizer_for(model, method)]
    if isinstance(method.adapter, AdaloraAdapter):
        from tasks.adapters.adalora import RankSteps

        steppers.append(RankSteps(model))
    meter = Meter()

    def tell(row: dict[str, Any]) -> None:
        taken = chosen[row["step"] - 1]
        on_row(row | meter.since_last(sum(lengths[i] for i in taken)))

    return train_loop(course, parameters, steppers, checkpoints, progress, tell, watch, at_once)


def tokens_of(examples: Sequence[Example], method: Method, steps: int) -> int:
    """Count the tokens that a training goes through in its first `steps` steps, over all epochs."""
    lengths = lengths_of(examples)
    return sum(lengths[i] for chosen in all_batches(lengths, method)[:steps] for i in chosen)


def learning_rate(step: int, steps: int, method: Method) -> float:
    """Compute the learning rate at a step, from 0, by the method's schedule."""
    asked = method.schedule
    shape, decay = ("wsd", asked.wsd) if isinstance(asked, WarmupStableDecay) else (asked, 1.0)
    return schedule(step, steps, peak=method.learning_rate, warmup_steps=method.warmup_steps, shape=shape, decay=decay)


def taking(method: Method, rows: AdaptiveMicroBatch) -> Method:
    """Return the method with as many rows in a forward pass as there is memory for."""
    return method.model_copy(update={"micro_batch_size": rows.rows})


def check_outcome(initial: Mapping[str, Tensor], model: Model, before: float, after: float) -> None:
    """Refuse to publish a training without a result.

    Raises:
        BadInput: the training changed nothing.
        Diverged: it ended much worse than it began: by more than a blind guess among all tokens loses, ln(vocabulary).
    """
    now = published_state(model)
    if all(tensor.shape == initial[name].shape and tensor.equal(initial[name]) for name, tensor in now.items()):
        raise BadInput("the training changed nothing", where="train", fix="raise learning_rate")
    if not after - before < math.log(model.config.get_text_config().vocab_size):
        raise Diverged(
            "the training diverged; nothing was published",
            where="its end",
            got=f"a held-out loss of {after:.3f}, which was {before:.3f} before",
            fix="lower learning_rate or raise warmup_steps",
        )
