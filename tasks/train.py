"""Trains one method: an adapter by an objective, on the rendered training rows.

Reads:  data/base/, data/rendered/.
Writes: data/adapters/METHOD/: adapter_model.safetensors, adapter_config.json, log.jsonl (one row per step),
        summary.json, samples.jsonl where replies were asked for.
Params: train.METHOD
Fails:  rows of the wrong kind, labelled replies of one label, an objective that is not for this kind of model, a loss
        or gradient that is not finite, a checkpoint of another training (65, never retried); too little memory (71,
        never retried); a signal (75, after a checkpoint).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import distributed, launch, process, sharding
from tasks.adapted import fresh, publish, published_state
from tasks.adapter_params import AdaloraAdapter
from tasks.architecture import architecture_in
from tasks.batches import all_batches, data_digests, kind_of_rows, lengths_of, needed_of, read_examples, steps_per_epoch
from tasks.checkpoints import Stepper, check_writable, checkpoint_folder
from tasks.device import settle
from tasks.errors import BadInput, BadModel, BadParams, Diverged
from tasks.estimate import must_recompute
from tasks.examples import Example, parts_of, referred
from tasks.hollow import read_config
from tasks.loop import NOTHING, Course, run, schedule
from tasks.losses import below_for, fast_products, held_out_loss, losses_of
from tasks.memory import RowsAtOnce, explained, keep_freed_memory, recompute_activations, rows_at_once
from tasks.meter import Meter
from tasks.models import Model
from tasks.objective_params import ReferringObjective
from tasks.optimizers import optimizer_for
from tasks.outputs import as_json, whole_folder
from tasks.params import Evaluation, Method, Samples, WarmupStableDecay
from tasks.progress import Progress
from tasks.reference import Reference, precomputed
from tasks.reporting import check_installed, reports
from tasks.samples import FILE as SAMPLES_FILE
from tasks.samples import lines_of, replies
from tasks.templates import load_tokenizer
from tasks.tracking import KEPT_LOSS, Tracker, flat
from tasks.watch import HELD_OUT_LOSS, SAMPLES, Log, Look, Watch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


def reference_for(
    model: Model, examples: Sequence[Example], held_out: Sequence[Example], method: Method, checkpoints: Path
) -> Reference | None:
    """The reference of an untrained model for all that a training will ask, where it is to be computed ahead."""
    if not isinstance(method.objective, ReferringObjective) or method.objective.reference != "precomputed":
        return None
    steps = [[examples[i] for i in chosen] for chosen in all_batches(lengths_of(examples), method)]
    rows = referred([*steps, *parts_of(held_out, method.batch_rows)], method)
    with fast_products(method):
        return precomputed(model, rows, method.micro_batch_rows, checkpoints / "reference")


def watch_for(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Example],
    method: Method,
    loss: Callable[[], float],
) -> Watch:
    """What params ask to look at in the course of the training; `loss` is that of the held-out rows."""
    looks, patience, keep_best = list[Look](), None, False
    if isinstance(method.evaluation, Evaluation):
        asked = method.evaluation
        patience = None if asked.patience == "never" else asked.patience
        keep_best = asked.keep == "best"
        looks.append(Look(HELD_OUT_LOSS, asked.every_steps, loss))
    if isinstance(method.samples, Samples):
        wanted, prompts = method.samples, [example[0] for example in held_out[: method.samples.prompts]]
        looks.append(
            Look(SAMPLES, wanted.every_steps, lambda: replies(model, tokenizer, prompts, wanted.max_new_tokens))
        )
    return Watch(looks, patience, keep_best)


def train(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    reference: Reference | None = None,
    watch: Watch = NOTHING,
    rows: RowsAtOnce | None = None,
) -> list[dict[str, Any]]:
    """Trains the model's adapter in place; goes on from the newest checkpoint. Returns the log of the loop.

    `on_row` is also told what differs from run to run: speed and memory. `reference` is made here where it is missing.

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
    below = below_for(model, examples, method)
    at_once = rows or RowsAtOnce(method.micro_batch_rows, fit=method.fit_memory)

    course = Course(
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
    meter = Meter(model)

    def tell(row: dict[str, Any]) -> None:
        taken = chosen[row["step"] - 1]
        on_row(row | meter.since_last(sum(lengths[i] for i in taken), needed_of([examples[i] for i in taken])))

    return run(course, parameters, steppers, checkpoints, progress, tell, watch, at_once)


def tokens_of(examples: Sequence[Example], method: Method, steps: int) -> int:
    """How many tokens a training goes through in its first so many steps, over all epochs."""
    lengths = lengths_of(examples)
    return sum(lengths[i] for chosen in all_batches(lengths, method)[:steps] for i in chosen)


def learning_rate(step: int, steps: int, method: Method) -> float:
    """The rate at a step, from 0, by the method's schedule."""
    asked = method.schedule
    shape, decay = ("wsd", asked.wsd) if isinstance(asked, WarmupStableDecay) else (asked, 1.0)
    return schedule(step, steps, peak=method.learning_rate, warmup_steps=method.warmup_steps, shape=shape, decay=decay)


def taking(method: Method, rows: RowsAtOnce) -> Method:
    """The method with as many rows in a forward pass as there is memory for."""
    return method.model_copy(update={"micro_batch_rows": rows.rows})


def check_launched(name: str, method: Method) -> None:
    """Refuses what several processes cannot do.

    Raises:
        BadParams: a forward pass is to make do with fewer rows in one of them alone, or weights cannot be sharded.
    """
    if distributed.world() != distributed.ALONE and method.fit_memory:
        raise BadParams(
            "several processes cannot fit their rows to memory, since all must take as many",
            where=f"train.{name}.fit_memory",
            got=f"true, in {distributed.world().size} processes",
            expected="false",
            fix=f"set it so, and micro_batch_rows to what `temper estimate --method {name}` says would fit",
        )
    sharding.check(method.adapter)


def check_outcome(initial: Mapping[str, torch.Tensor], model: Model, before: float, after: float) -> None:
    """Refuses to publish what is no result.

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


def say_what_was_kept(name: str, log: Log, watch: Watch, steps: int, before: float, after: float) -> None:
    """Prints how a training ended."""
    if len(log) < steps:
        print(f"train {name}: stopped early: no lower held-out loss in {watch.patience} evaluations", flush=True)
    kept = f"; kept the weights of step {watch.kept_step(log)}, the best" if watch.keep_best else ""
    print(f"train {name}: {len(log)} of {steps} steps, held-out loss {before:.3f} -> {after:.3f}{kept}", flush=True)


def main() -> None:
    """The stage `train@METHOD`, in one process or in several that were launched together."""
    launch.launch_if_asked("tasks.train")
    with process.stage(__doc__, "base", "rendered", "out", item="method") as stage, distributed.group():
        fits = f"what `temper estimate --method {stage.item}` says would fit"
        alone = distributed.world() == distributed.ALONE
        fix = f"set train.{stage.item}.fit_memory: true, or {fits}" if alone else f"set {fits}"
        method, checkpoints = stage.params.train[stage.item], checkpoint_folder(stage.workspace, stage.key)
        check_launched(stage.item, method)
        check_installed(method.report_to)
        check_writable(checkpoints)
        keep_freed_memory()
        with (
            explained(where=f"train.{stage.item}", fix=fix),
            rows_at_once(method.micro_batch_rows, fit=method.fit_memory, checkpoints=checkpoints) as rows,
        ):
            _train_stage(stage, method, checkpoints, rows)


def _train_stage(stage: process.Stage, method: Method, checkpoints: Path, rows: RowsAtOnce) -> None:
    """The stage's work, once it is known what it may take."""
    base, rendered, title = stage.path("base"), stage.path("rendered"), f"train {stage.item}"
    architecture = architecture_in(base)
    data = data_digests(rendered, kind_of_rows(method, architecture))
    examples = read_examples(rendered, "train", method, architecture)
    held_out = read_examples(rendered, "held_out", method, architecture)[:HELD_OUT_ROWS]
    if method.batch_rows > len(examples):
        print(
            f"{title}: every step takes all {len(examples)} rows, fewer than batch_rows={method.batch_rows}", flush=True
        )
    settle(method.seed)
    steps = method.epochs * steps_per_epoch(len(examples), method.batch_rows)
    recomputing = rows.recomputing(lambda: must_recompute(read_config(base), method, examples))
    model = fresh(base, method.adapter, steps)
    if recomputing:
        recompute_activations(model)
    if distributed.shards_weights():
        sharding.shard(model)
    reference = reference_for(model, examples, held_out, method, checkpoints)

    def loss() -> float:
        return rows.fitted(lambda: held_out_loss(model, held_out, taking(method, rows), reference))

    watch = watch_for(model, load_tokenizer(base), held_out, method, loss)
    initial, before = {name: tensor.clone() for name, tensor in published_state(model).items()}, loss()
    tags = {"temper.method": stage.item, "temper.stage": f"train@{stage.item}"}
    params = flat(method.model_dump())
    with (
        Progress(title, steps, "steps") as progress,
        Tracker(stage.workspace, stage.key, title, tags, params, data) as tracker,
        reports(method.report_to, stage.workspace, stage.key, title, params) as others,
    ):

        def on_row(row: dict[str, Any]) -> None:
            tracker.log(row)
            for other in others:
                other.log(row)

        settle(method.seed)
        log = train(model, examples, method, checkpoints, progress, on_row, reference, watch, rows)
        after = loss()
        check_outcome(initial, model, before, after)
        tracker.log({"step": watch.kept_step(log), KEPT_LOSS: after})
    summary = {
        "key": stage.key,
        "method": stage.item,
        "steps": len(log),
        "planned_steps": steps,
        "kept_step": watch.kept_step(log),
        "rows": len(examples),
        "tokens": tokens_of(examples, method, len(log)),
        "data": data,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "params": method.model_dump(),
    }
    if distributed.is_first():
        with whole_folder(stage.path("out")) as folder:
            publish(model, folder)
            (folder / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in log))
            (folder / "summary.json").write_text(as_json(summary))
            if isinstance(method.samples, Samples):
                (folder / SAMPLES_FILE).write_text(lines_of(log))
    distributed.wait()  # what was read must stay as it is until all is written
    say_what_was_kept(stage.item, log, watch, steps, before, after)


if __name__ == "__main__":
    main()
