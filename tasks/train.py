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
from tasks.adapter_params import AdaloraAdapter, ReftAdapter
from tasks.architecture import ENCODER_DECODER, Architecture, architecture_in
from tasks.checkpoints import Stepper, check_writable, checkpoint_folder
from tasks.device import settle
from tasks.errors import BadData, BadInput, BadModel, BadParams, Diverged
from tasks.examples import Example, learns_prompts, parts_of, referred
from tasks.loop import NOTHING, Course, run, schedule
from tasks.losses import fast_products, held_out_loss, losses_of
from tasks.memory import RowsAtOnce, explained, keep_freed_memory, rows_at_once
from tasks.meter import Meter
from tasks.models import Model, TokenRow
from tasks.objective_params import KtoObjective, ReferringObjective, SftObjective
from tasks.optimizers import optimizer_of
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.params import Evaluation, Method, Samples, WarmupStableDecay
from tasks.progress import Progress
from tasks.reference import Reference, precomputed
from tasks.reporting import check_installed, reports
from tasks.samples import FILE as SAMPLES_FILE
from tasks.samples import lines_of, replies
from tasks.scoring import row_of
from tasks.tables import read_rows
from tasks.templates import load_tokenizer
from tasks.tracking import KEPT_LOSS, Tracker, flat
from tasks.watch import HELD_OUT_LOSS, SAMPLES, Log, Look, Watch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tasks.adapters.below import Below

HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


# --- data -------------------------------------------------------------------------------------------------------------


def kind_of_rows(method: Method, architecture: Architecture) -> str:
    """The kind of rows that a method learns from: for SFT what the base answers, else pairs or labelled replies.

    Raises:
        BadParams: the objective is not for this kind of model.
    """
    if isinstance(method.objective, SftObjective):
        return architecture.rows
    if architecture is ENCODER_DECODER:
        raise BadParams(
            "preferences are learnt by decoders only",
            where="train.*.objective",
            got=f"{method.objective.name} on an {architecture.name} base",
            expected="sft, which learns inputs and their targets",
        )
    return "labelled" if isinstance(method.objective, KtoObjective) else "preference"


def read_examples(rendered: Path, split: str, method: Method, architecture: Architecture) -> list[Example]:
    """The rows that a method learns from, on a base of this kind.

    Raises:
        BadData: there is none, or KTO has nothing to tell apart.
        BadParams: the objective is not for this kind of model.
    """
    kind = kind_of_rows(method, architecture)
    path = rendered / split / f"{kind}.parquet"
    rows = read_rows(path)
    if not rows:
        raise BadData(
            f"holds no {kind} rows, which the objective {method.objective.name} learns from",
            where=str(path),
            got=f"a base that is of the kind {architecture.name}",
            fix="add a source with such rows, or remove the method from `train`",
        )
    if kind == "preference":
        replies = ("chosen_ids", "rejected_ids")
        return [tuple(_joined(row["prompt_ids"], row[reply]) for reply in replies) for row in rows]
    if kind == "labelled":
        labels = {row["label"] for row in rows}
        if split == "train" and len(labels) == 1:
            raise BadData(
                "holds replies of one label only, so there is nothing to tell apart",
                where=str(path),
                got=f"{len(rows)} replies that are all {'good' if labels == {True} else 'bad'}",
                expected="good and bad ones",
                fix="add a source with the others, or learn good replies by the objective sft",
            )
        return [(_joined(row["prompt_ids"], row["reply_ids"], desirable=row["label"]),) for row in rows]
    return [(row_of(row),) for row in rows]


def data_digests(rendered: Path, kind: str) -> dict[str, str]:
    """The SHA-256 of the files that a training reads, by their paths, after checking all of the folder."""
    files = read_manifest(rendered)["files"]
    names = [f"{split}/{kind}.parquet" for split in ("train", "held_out")]
    return {name: files[name]["sha256"] for name in names if name in files}


def _joined(prompt: list[int], reply: list[int], *, desirable: bool = True) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt), desirable)


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, over all its sequences."""
    return [sum(sequence.tokens for sequence in example) for example in examples]


def shapes_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Tokens of each sequence that a decoder reads, and how many of them are the prompt's."""
    sequences = [sequence for example in examples for sequence in example if isinstance(sequence, TokenRow)]
    return [(sequence.tokens, sequence.prompt_tokens) for sequence in sequences]


def all_batches(lengths: Sequence[int], method: Method) -> list[list[int]]:
    """The rows of every step: fixed by the method, so that a resumed training sees what it would have seen."""
    epochs = (batches_of(epoch, lengths, method.batch_rows, method.seed) for epoch in range(method.epochs))
    return [rows for epoch in epochs for rows in epoch]


def batches_of(epoch: int, lengths: Sequence[int], batch_rows: int, seed: int) -> list[list[int]]:
    """The rows of an epoch's steps.

    Every epoch is a new shuffle; within runs of sixteen batches rows are grouped by length, so that little is padding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 16 * batch_rows
    grouped = [
        i
        for start in range(0, len(order), window)
        for i in sorted(order[start : start + window], key=lengths.__getitem__)
    ]
    places = torch.randperm(steps_per_epoch(len(lengths), batch_rows), generator=generator).tolist()
    return [grouped[which * batch_rows : (which + 1) * batch_rows] for which in places]


def steps_per_epoch(rows: int, batch_rows: int) -> int:
    """The number of batches that cover all rows once."""
    return math.ceil(rows / batch_rows)


# --- the training -----------------------------------------------------------------------------------------------------


def optimizer_for(model: Model, method: Method) -> torch.optim.Optimizer:
    """The optimizer of all that is trainable."""
    return optimizer_of(method.optimizer, groups_of(model, method))


def groups_of(model: Model, method: Method) -> list[dict[str, Any]]:
    """What is trainable, by its weight decay."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # angles say how far a rotation is from where it began: decayed, it would be drawn back there
    angles = [p for name, p in parameters.items() if name.endswith(".angles")]
    others = [p for name, p in parameters.items() if not name.endswith(".angles")]
    return [{"params": others, "weight_decay": method.weight_decay}, {"params": angles, "weight_decay": 0.0}]


def below_for(model: Model, examples: Sequence[Example], method: Method) -> Below | None:
    """What keeps the hidden states that no edit changes, where there are such and they are needed again."""
    if distributed.shards_weights():
        return None  # what is needed again differs from process to process, and so would their passes
    noisy = isinstance(method.objective, SftObjective) and method.objective.neftune_alpha > 0
    # noise makes them others every time, and where prompts are learnt all of their tokens must be there
    if not isinstance(method.adapter, ReftAdapter) or method.epochs == 1 or noisy or learns_prompts(method):
        return None
    from tasks.adapters.below import Below

    return Below.of(model, shapes_of(examples), method.adapter.cache_mib << 20)


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
    meter = Meter()

    def tell(row: dict[str, Any]) -> None:
        on_row(row | meter.since_last(sum(lengths[i] for i in chosen[row["step"] - 1])))

    return run(course, parameters, steppers, checkpoints, progress, tell, watch, at_once)


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
    model = fresh(base, method.adapter, steps)
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
