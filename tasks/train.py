"""Trains one method: an adapter by an objective, on the rendered training rows.

Reads:  data/base/, data/rendered/.
Writes: data/adapters/METHOD/: adapter_model.safetensors, adapter_config.json, log.jsonl (one row per step),
        summary.json.
Params: train.METHOD
Fails:  rows of the wrong kind, an objective that is not for this kind of model, a loss or gradient that is not finite
        (65, never retried); a signal (75, after a checkpoint).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import process
from tasks.adapted import fresh, publish, published_state
from tasks.adapter_params import AdaloraAdapter, FullAdapter, ReftAdapter
from tasks.architecture import ENCODER_DECODER, Architecture, architecture_in
from tasks.checkpoints import Stepper, checkpoint_folder
from tasks.device import compute_dtype, device, settle
from tasks.errors import BadData, BadInput, BadParams
from tasks.loop import Course, run, schedule
from tasks.models import Model, TokenRow
from tasks.optimizers import optimizer_of
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.params import Method, OrpoObjective
from tasks.progress import Progress
from tasks.scoring import Row, row_of, score
from tasks.tables import read_rows
from tasks.tracking import Tracker, flat

if TYPE_CHECKING:
    import torch

    from tasks.adapters.below import Below

Example = tuple[Row, ...]
"""What one row of the data gives to learn from: one sequence, or a chosen and a rejected one with the same prompt."""

HELD_OUT_ROWS = 128
"""Held-out loss is read on so many rows, before and after."""


# --- data -------------------------------------------------------------------------------------------------------------


def kind_of_rows(method: Method, architecture: Architecture) -> str:
    """The kind of rows that a method learns from: preference pairs for ORPO; for SFT what the base answers.

    Raises:
        BadParams: the objective is not for this kind of model.
    """
    if not isinstance(method.objective, OrpoObjective):
        return architecture.rows
    if architecture is ENCODER_DECODER:
        raise BadParams(
            "preferences are learnt by decoders only",
            where="train.*.objective",
            got=f"{method.objective.name} on an {architecture.name} base",
            expected="sft, which learns inputs and their targets",
        )
    return "preference"


def read_examples(rendered: Path, split: str, method: Method, architecture: Architecture) -> list[Example]:
    """The rows that a method learns from, on a base of this kind.

    Raises:
        BadData: there is none.
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
    if kind == architecture.rows:
        return [(row_of(row),) for row in rows]
    return [tuple(_joined(row["prompt_ids"], row[reply]) for reply in ("chosen_ids", "rejected_ids")) for row in rows]


def _joined(prompt: list[int], reply: list[int]) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, over all its sequences."""
    return [sum(sequence.tokens for sequence in example) for example in examples]


def shapes_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Tokens of each sequence that a decoder reads, and how many of them are the prompt's."""
    sequences = [sequence for example in examples for sequence in example if isinstance(sequence, TokenRow)]
    return [(sequence.tokens, sequence.prompt_tokens) for sequence in sequences]


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


def losses_of(
    model: Model, examples: Sequence[Example], method: Method, below: Below | None = None
) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    """The objective on the examples of a step, in parts of `micro_batch_rows` that add up to it.

    Each is a scalar to differentiate, and its share of what is logged. `below` keeps what does not change from epoch to
    epoch.
    """
    for some in _batches(examples, method.micro_batch_rows):
        loss, logged = loss_of(model, some, method, below, share=_share(some, examples))
        if isinstance(method.adapter, AdaloraAdapter):
            from tasks.adapters.adalora import orthogonality_penalty

            penalty = orthogonality_penalty(model) * len(some) / len(examples)
            loss, logged = loss + method.adapter.orthogonality * penalty, {**logged, "penalty": penalty.item()}
        yield loss, logged


class Share(NamedTuple):
    """Which share of a step's scored tokens and of its rows belongs to some of its examples."""

    tokens: float
    rows: float


def _share(some: Sequence[Example], examples: Sequence[Example]) -> Share:
    def tokens(of: Sequence[Example]) -> int:
        return sum(example[0].scored_tokens for example in of)

    return Share(tokens(some) / tokens(examples), len(some) / len(examples))


WHOLE = Share(1.0, 1.0)


def loss_of(
    model: Model, examples: Sequence[Example], method: Method, below: Below | None = None, share: Share = WHOLE
) -> tuple[torch.Tensor, dict[str, float]]:
    """The objective on some examples, as far as they are a part of a step: what all parts give adds up to it."""
    with _fast_products(method):
        return _loss_of(model, examples, method, below, share)


def _fast_products(method: Method) -> AbstractContextManager[object]:
    """Multiplies float32 weights in the machine's fast format where all of them are trained."""
    import torch

    if not isinstance(method.adapter, FullAdapter):
        return nullcontext()
    return torch.autocast(device().type, compute_dtype(), enabled=compute_dtype() != torch.float32)


def _loss_of(
    model: Model, examples: Sequence[Example], method: Method, below: Below | None, share: Share
) -> tuple[torch.Tensor, dict[str, float]]:
    from tasks.objectives.orpo import orpo_loss
    from tasks.objectives.sft import sft_loss

    if not isinstance(method.objective, OrpoObjective):
        return sft_loss(score(model, [example[0] for example in examples], below).logp) * share.tokens, {}
    n = len(examples)
    rows = [example[i] for i in (0, 1) for example in examples]  # chosen first, then rejected
    scored = score(model, rows, below)
    means = scored.row_means()
    # the likelihood is a mean over tokens, the penalty one over pairs
    nll = -scored.logp[scored.row < n].mean() * (share.tokens / share.rows)
    terms = orpo_loss(means[:n], means[n:], nll, weight=method.objective.weight)
    logged = {name: value.item() * share.rows for name, value in terms._asdict().items() if name != "loss"}
    return terms.loss * share.rows, logged


def held_out_loss(model: Model, examples: Sequence[Example], method: Method) -> float:
    """The objective's mean over held-out examples, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        sizes = [len(batch) for batch in _batches(examples, method.micro_batch_rows)]
        losses = [loss_of(model, batch, method)[0].item() for batch in _batches(examples, method.micro_batch_rows)]
    model.train()
    return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)


def _batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


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
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
        losses=lambda step: losses_of(model, [examples[i] for i in chosen(step)], method, below),
        describe=lambda step: [f"row {i} of the rendered training rows" for i in chosen(step)],
        max_grad_norm=method.max_grad_norm,
        checkpoint_every_steps=method.checkpoint_every_steps,
    )
    steppers: list[Stepper] = [optimizer_for(model, method)]
    if isinstance(method.adapter, AdaloraAdapter):
        from tasks.adapters.adalora import RankSteps

        steppers.append(RankSteps(model))
    return run(course, parameters, steppers, checkpoints, progress, on_row)


def main() -> None:
    """The stage `train@METHOD`."""
    with process.stage(__doc__, "base", "rendered", "out", item="method") as stage:
        method = stage.params.train[stage.item]
        read_manifest(stage.path("rendered"))
        architecture = architecture_in(stage.path("base"))
        examples = read_examples(stage.path("rendered"), "train", method, architecture)
        held_out = read_examples(stage.path("rendered"), "held_out", method, architecture)[:HELD_OUT_ROWS]
        settle(method.seed)
        steps = method.epochs * steps_per_epoch(len(examples), method.batch_rows)
        model = fresh(stage.path("base"), method.adapter, steps)
        initial = {name: tensor.clone() for name, tensor in published_state(model).items()}
        before = held_out_loss(model, held_out, method)
        tags = {"temper.method": stage.item, "temper.stage": f"train@{stage.item}"}
        with (
            Progress(f"train {stage.item}", steps, "steps") as progress,
            Tracker(stage.workspace, stage.key, f"train {stage.item}", tags, flat(method.model_dump())) as tracker,
        ):
            settle(method.seed)
            log = train(model, examples, method, checkpoint_folder(stage.workspace, stage.key), progress, tracker.log)
            after = held_out_loss(model, held_out, method)
            tracker.log({"step": len(log), "held_out_loss": after})
        after_training = published_state(model)
        if all(
            tensor.shape == initial[name].shape and tensor.equal(initial[name])
            for name, tensor in after_training.items()
        ):
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
