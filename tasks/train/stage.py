"""Train one method: an adapter by an objective, on the rendered training rows.

Reads:  data/base/, data/rendered/.
Writes: data/adapters/METHOD/: adapter_model.safetensors, adapter_config.json, log.jsonl (one row per step),
        summary.json, samples.jsonl where replies were asked for.
Params: train.METHOD, train_defaults
Fails:  rows of the wrong kind, labelled replies of one label, an objective that is not for this kind of model, a loss
        or gradient that is not finite, a checkpoint of another training (65, never retried); too little memory (71,
        never retried); a signal (75, after a checkpoint).
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.adapters.attach import save_adapter
from tasks.core import ranks
from tasks.core.artifacts import as_json, atomic_folder
from tasks.core.errors import BadParams
from tasks.core.memory import explain_out_of_memory
from tasks.core.progress import Progress
from tasks.core.stage import StageContext, run_stage
from tasks.deltas.base_tensors import check_mergeable
from tasks.engine import collectives
from tasks.engine.checkpoints import check_writable, checkpoint_folder
from tasks.engine.evaluation_hooks import EvalHooks
from tasks.engine.memory import AdaptiveMicroBatch, adaptive_micro_batch, keep_freed_blocks
from tasks.inference.logprobs import BY_LENGTH, WHOLE, find_out
from tasks.models.decoder import unwrapped
from tasks.models.device import seed_everything
from tasks.models.loader import Model
from tasks.registry.client import KEPT_LOSS, flat
from tasks.reports.training_log import Log
from tasks.tokenization.architecture import architecture_in
from tasks.tokenization.chat_template import load_tokenizer
from tasks.train import fsdp, launcher
from tasks.train.batching import data_digests, kind_of_rows, read_examples
from tasks.train.hooks import FILE as SAMPLES_FILE
from tasks.train.hooks import lines_of, watch_for
from tasks.train.loggers import check_installed, reports
from tasks.train.mlflow_logger import Tracker
from tasks.train.params import Method, Samples
from tasks.train.trainer import HELD_OUT_ROWS, check_outcome, initial_state, prepare, train


def check_launched(name: str, method: Method) -> None:
    """Refuse what several processes cannot do.

    Raises:
        BadParams: a forward pass may take fewer rows in one of them alone, or weights cannot be sharded.
    """
    if ranks.world() != ranks.ALONE and method.fit_memory:
        raise BadParams(
            "several processes cannot fit their rows to memory, since all must take as many",
            where=f"train.{name}.fit_memory",
            got=f"true, in {ranks.world().size} processes",
            expected="false",
            fix=f"set it so, and micro_batch_size to what `temper estimate --method {name}` says would fit",
        )
    fsdp.check_can_shard(method.adapter)


def say_what_was_kept(name: str, log: Log, watch: EvalHooks, steps: int, before: float, after: float) -> None:
    """Print how a training ended."""
    if len(log) < steps:
        print(f"train {name}: stopped early: no lower held-out loss in {watch.patience} evaluations", flush=True)
    kept = f"; kept the weights of step {watch.kept_step(log)}, the best" if watch.keep_best else ""
    print(f"train {name}: {len(log)} of {steps} steps, held-out loss {before:.3f} -> {after:.3f}{kept}", flush=True)


def prove_mergeable(model: Model, base: Path) -> None:
    """Refuse to train an adapter that could not be merged, which would be found only hours later.

    Raises:
        BadModel: its names or shapes do not fit the files of the base.
    """
    from peft import PeftModel

    if ranks.is_first() and isinstance(model, PeftModel):
        with TemporaryDirectory() as folder:
            save_adapter(model, Path(folder))
            check_mergeable(base, Path(folder))


def main() -> None:
    """Run the stage `train@METHOD`, in one process or in several that were launched together."""
    launcher.launch_if_asked("tasks.train")
    with run_stage(__doc__, "base", "rendered", "out", item="method") as stage, collectives.group():
        fits = f"what `temper estimate --method {stage.item}` says would fit"
        alone = ranks.world() == ranks.ALONE
        fix = f"set train.{stage.item}.fit_memory: true, or {fits}" if alone else f"set {fits}"
        method, checkpoints = (
            stage.section(f"train.{stage.item}", Method),
            checkpoint_folder(stage.workspace, stage.key),
        )
        check_launched(stage.item, method)
        check_installed(method.report_to)
        check_writable(checkpoints)
        keep_freed_blocks()
        with (
            explain_out_of_memory(where=f"train.{stage.item}", fix=fix),
            adaptive_micro_batch(method.micro_batch_size, fit=method.fit_memory, checkpoints=checkpoints) as rows,
        ):
            _train_stage(stage, method, checkpoints, rows)


def _train_stage(stage: StageContext, method: Method, checkpoints: Path, rows: AdaptiveMicroBatch) -> None:
    """Run the stage's work, once it is known how much memory it may take."""
    base, rendered, title = stage.path("base"), stage.path("rendered"), f"train {stage.item}"
    architecture = architecture_in(base)
    data = data_digests(rendered, kind_of_rows(method.objective, architecture))
    examples = read_examples(rendered, "train", method.objective, architecture)
    held_out = read_examples(rendered, "held_out", method.objective, architecture)[:HELD_OUT_ROWS]
    if method.batch_size > len(examples):
        print(
            f"{title}: every step takes all {len(examples)} rows, fewer than batch_size={method.batch_size}", flush=True
        )
    training = prepare(base, method, examples, held_out, checkpoints, rows)
    model, initial = training.model, initial_state(training.model)
    prove_mergeable(model, base)
    if (way := find_out(model)) in (BY_LENGTH, WHOLE) and ranks.is_first():
        print(f"{title}: the rows of {type(unwrapped(model)).__name__} are computed {way}, which is slower", flush=True)

    def loss() -> float:
        return training.losses.held_out(held_out, method.batch_size)

    watch, before = watch_for(model, load_tokenizer(base), held_out, method, loss), loss()
    tags = {"temper.method": stage.item, "temper.stage": f"train@{stage.item}"}
    params = flat(method.model_dump())
    with (
        Progress(title, training.plan.steps, "steps") as progress,
        Tracker(stage.workspace, stage.key, title, tags, params, data) as tracker,
        reports(method.report_to, stage.workspace, stage.key, title, params) as others,
    ):

        def on_row(row: dict[str, Any]) -> None:
            tracker.log(row)
            for other in others:
                other.log(row)

        seed_everything(method.seed)
        log = train(training, checkpoints, progress, on_row, watch)
        after = loss()
        check_outcome(initial, model, before, after)
        tracker.log({"step": watch.kept_step(log), KEPT_LOSS: after})
    summary = {
        "key": stage.key,
        "method": stage.item,
        "steps": len(log),
        "planned_steps": training.plan.steps,
        "kept_step": watch.kept_step(log),
        "rows": len(examples),
        "tokens": sum(training.tokens[: len(log)]),
        "data": data,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "params": method.model_dump(),
    }
    if ranks.is_first():
        with atomic_folder(stage.path("out")) as folder:
            save_adapter(model, folder)
            (folder / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in log))
            (folder / "summary.json").write_text(as_json(summary))
            if isinstance(method.samples, Samples):
                (folder / SAMPLES_FILE).write_text(lines_of(log))
    collectives.barrier()  # what was read must stay as it is until all is written
    say_what_was_kept(stage.item, log, watch, training.plan.steps, before, after)
