"""Trains one method: an adapter by an objective, on the rendered training rows.

Reads:  data/base/, data/rendered/.
Writes: data/adapters/METHOD/: adapter_model.safetensors, adapter_config.json, log.jsonl (one row per step),
        summary.json.
Params: train.METHOD
Fails:  rows of the wrong kind, a loss or gradient that is not finite (65, never retried); a signal (75, after a
        checkpoint).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import process
from tasks.adapted import fresh, publish, published_state
from tasks.adapter_params import ReftAdapter
from tasks.checkpoints import checkpoint_folder
from tasks.device import settle
from tasks.errors import BadData, BadInput
from tasks.loop import Course, run, schedule
from tasks.models import Model, TokenRow, score_tokens
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.params import Method, OrpoObjective
from tasks.progress import Progress
from tasks.tables import read_rows
from tasks.tracking import Tracker, flat

if TYPE_CHECKING:
    import torch

    from tasks.adapters.below import Below

Example = tuple[TokenRow, ...]
"""What one row of the data gives to learn from: one sequence, or a chosen and a rejected one with the same prompt."""

HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


# --- data -------------------------------------------------------------------------------------------------------------


def read_examples(rendered: Path, split: str, method: Method) -> list[Example]:
    """The rows that a method learns from: preference pairs for ORPO, chats for SFT.

    Raises:
        BadData: there is none.
    """
    kind = "preference" if isinstance(method.objective, OrpoObjective) else "chat"
    path = rendered / split / f"{kind}.parquet"
    rows = read_rows(path)
    if not rows:
        raise BadData(
            f"holds no {kind} rows, which the objective {method.objective.name} learns from",
            where=str(path),
            fix="add a source with such rows, or remove the method from `train`",
        )
    if kind == "chat":
        return [(TokenRow(row["ids"], row["mask"], row["prompt_tokens"]),) for row in rows]
    return [tuple(_joined(row["prompt_ids"], row[reply]) for reply in ("chosen_ids", "rejected_ids")) for row in rows]


def _joined(prompt: list[int], reply: list[int]) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, over all its sequences."""
    return [sum(len(sequence.ids) for sequence in example) for example in examples]


def shapes_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Tokens of each sequence, and how many of them are the prompt's."""
    return [(len(sequence.ids), sequence.prompt_tokens) for example in examples for sequence in example]


def batch_of(step: int, lengths: Sequence[int], batch_rows: int, seed: int) -> list[int]:
    """The rows of a step: a fixed function of the step, so that a resumed training sees what it would have seen."""
    epoch, place = divmod(step, steps_per_epoch(len(lengths), batch_rows))
    return batches_of(epoch, lengths, batch_rows, seed)[place]


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


# --- one step ---------------------------------------------------------------------------------------------------------


def loss_of(
    model: Model, examples: Sequence[Example], method: Method, below: Below | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective on some examples: a scalar to differentiate, and what to log beside it.

    `below` keeps what does not change from epoch to epoch.
    """
    from tasks.objectives.orpo import orpo_loss
    from tasks.objectives.sft import sft_loss

    if not isinstance(method.objective, OrpoObjective):
        return sft_loss(score_tokens(model, [example[0] for example in examples], below).logp), {}
    n = len(examples)
    rows = [example[i] for i in (0, 1) for example in examples]  # chosen first, then rejected
    scored = score_tokens(model, rows, below)
    means = scored.row_means()
    nll = -scored.logp[scored.row < n].mean()
    terms = orpo_loss(means[:n], means[n:], nll, weight=method.objective.weight)
    logged = terms._asdict()
    return logged.pop("loss"), {name: value.item() for name, value in logged.items()}


def held_out_loss(model: Model, examples: Sequence[Example], method: Method) -> float:
    """The objective's mean over held-out examples, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        sizes = [len(batch) for batch in _batches(examples, method.batch_rows)]
        losses = [loss_of(model, batch, method)[0].item() for batch in _batches(examples, method.batch_rows)]
    model.train()
    return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


# --- the training -----------------------------------------------------------------------------------------------------


def optimizer_for(model: Model, method: Method) -> torch.optim.Optimizer:
    """AdamW on all that is trainable; its states have the dtype of the parameters."""
    import torch

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # angles say how far a rotation is from where it began: decayed, it would be drawn back there
    angles = [p for name, p in parameters.items() if name.endswith(".angles")]
    others = [p for name, p in parameters.items() if not name.endswith(".angles")]
    groups = [{"params": others, "weight_decay": method.weight_decay}, {"params": angles, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups)


def below_for(model: Model, examples: Sequence[Example], method: Method) -> Below | None:
    """What keeps the hidden states that no edit changes, where there are such and they are needed again."""
    if not isinstance(method.adapter, ReftAdapter) or method.epochs == 1:
        return None
    from tasks.adapters.below import Below

    return Below.of(model, shapes_of(examples), method.adapter.cache_mib << 20)


def train(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    checkpoints: Path,
    progress: Progress,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Trains the model's adapter in place; goes on from the newest checkpoint. Returns the log of the loop."""
    optimizer = optimizer_for(model, method)
    lengths = lengths_of(examples)
    steps = method.epochs * steps_per_epoch(len(examples), method.batch_rows)
    below = below_for(model, examples, method)

    def chosen(step: int) -> list[int]:
        return batch_of(step, lengths, method.batch_rows, method.seed)

    course = Course(
        steps=steps,
        learning_rate=lambda step: schedule(
            step, steps, peak=method.learning_rate, warmup_steps=method.warmup_steps, shape=method.schedule
        ),
        loss=lambda step: loss_of(model, [examples[i] for i in chosen(step)], method, below),
        describe=lambda step: [f"row {i} of the rendered training rows" for i in chosen(step)],
        max_grad_norm=method.max_grad_norm,
        checkpoint_every_steps=method.checkpoint_every_steps,
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return run(course, parameters, [optimizer], checkpoints, progress, on_row)


def main() -> None:
    """The stage `train@METHOD`."""
    with process.stage(__doc__, "base", "rendered", "out", item="method") as stage:
        method = stage.params.train[stage.item]
        read_manifest(stage.path("rendered"))
        examples = read_examples(stage.path("rendered"), "train", method)
        held_out = read_examples(stage.path("rendered"), "held_out", method)[:HELD_OUT_ROWS]
        settle(method.seed)
        model = fresh(stage.path("base"), method.adapter)
        initial = {name: tensor.clone() for name, tensor in published_state(model).items()}
        before = held_out_loss(model, held_out, method)
        steps = method.epochs * steps_per_epoch(len(examples), method.batch_rows)
        tags = {"temper.method": stage.item, "temper.stage": f"train@{stage.item}"}
        with (
            Progress(f"train {stage.item}", steps, "steps") as progress,
            Tracker(stage.workspace, stage.key, f"train {stage.item}", tags, flat(method.model_dump())) as tracker,
        ):
            settle(method.seed)
            log = train(model, examples, method, checkpoint_folder(stage.workspace, stage.key), progress, tracker.log)
            after = held_out_loss(model, held_out, method)
            tracker.log({"step": len(log), "held_out_loss": after})
        if all(tensor.equal(initial[name]) for name, tensor in published_state(model).items()):
            raise BadInput("the training changed nothing", where=stage.item, fix="raise learning_rate")
        summary = {
            "key": stage.key,
            "method": stage.item,
            "steps": len(log),
            "rows": len(examples),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "params": method.model_dump(),
        }
        with whole_folder(stage.path("out")) as folder:
            publish(model, folder)
            (folder / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in log))
            (folder / "summary.json").write_text(as_json(summary))
        print(f"train {stage.item}: {len(log)} steps, held-out loss {before:.3f} -> {after:.3f}", flush=True)


if __name__ == "__main__":
    main()
