"""Training an adapter on rendered rows, as the stage `train` does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from temper._methods import SFT, AnyAdapter, AnyObjective, LoRA, adapter_section, checked, objective_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.models.loader import Model
    from tasks.train.params import Method
    from temper._data import Data
    from temper._models import Base


@dataclass(frozen=True)
class Adapter:
    """A trained adapter on its base, in memory.

    Attributes:
        base: what it was trained on.
        model: the base, in the form it was trained on, with the adapter.
        method: the training's params.
        log: one row per step: its loss, gradient norm and learning rate.
        held_out_loss: in nats per token, before and after; None without held-out rows.
    """

    base: Base
    model: Model
    method: Method
    log: Sequence[Mapping[str, Any]]
    held_out_loss: tuple[float, float] | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer."""
        return self.base.tokenizer

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as a new folder with a manifest, in the form that PEFT reads; return the folder.

        Raises:
            BadParams: the folder exists.
        """
        from tasks.adapters.attach import save_adapter
        from tasks.core.artifacts import as_json, atomic_folder
        from tasks.core.errors import BadParams

        place = Path(folder)
        if place.exists():
            raise BadParams("exists already", where=str(place), fix="name a new folder, or remove this one")
        with atomic_folder(place) as draft:
            save_adapter(self.model, draft)
            (draft / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in self.log))
            before, after = self.held_out_loss or (None, None)
            about = {"params": self.method.model_dump(), "held_out_loss_before": before, "held_out_loss_after": after}
            (draft / "summary.json").write_text(as_json(about))
        return place


def train(
    base: Base,
    data: Data,
    adapter: AnyAdapter | None = None,
    objective: AnyObjective | None = None,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    learning_rate: float = 3e-3,
    optimizer: str = "adamw",
    schedule: str | Mapping[str, float] = "cosine",
    warmup_steps: int = 10,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    fit_memory: bool = False,
    seed: int = 1,
    checkpoints: str | Path | None = None,
    checkpoint_every_steps: int = 50,
) -> Adapter:
    """Train an adapter by an objective: the same bits as the stage `train` gives for the same rows and params.

    The base is read anew in the form that the adapter wants (QLoRA: in 4 bits). All random generators of torch are
    seeded, and deterministic kernels asked for.

    Args:
        base: what `load_model` gave, without an adapter.
        data: what `render` gave; the held-out loss is of its first 128 held-out rows.
        adapter: LoRA(), QLoRA(), ReFT(), Full(), or any section of docs/params.md; LoRA() by default.
        objective: SFT(), ORPO(), DPO(), SimPO() or KTO(); SFT() by default.
        epochs: passes over the rows.
        batch_size: rows in a step.
        micro_batch_size: rows in a forward pass; gradients of a step's passes are added up. By default all at once.
        learning_rate: the peak, after warm-up.
        optimizer: of docs/params.md.
        schedule: constant, linear, cosine, or {"wsd": share}.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled.
        max_grad_norm: gradients are scaled down to this norm.
        fit_memory: whether a step that runs out of memory is taken again with half the rows at once.
        seed: of the adapter's initial weights, the order of rows, and dropout.
        checkpoints: a folder of this training's own, from which it goes on when it was interrupted; None: none is kept.
        checkpoint_every_steps: how often one is written there.

    Raises:
        BadParams: an option is wrong, or the objective is not for this kind of model.
        BadData: there are no rows of the kind that the objective learns from.
        BadModel: the adapter does not fit the model.
        Diverged: a loss or gradient is not finite, or the end is worse than a blind guess.
        OutOfMemory: more memory is needed than there is.
    """
    from tasks.train.params import Method

    method: Method = checked(
        Method,
        {
            "adapter": adapter_section(adapter or LoRA()),
            "objective": objective_section(objective or SFT()),
            "epochs": epochs,
            "batch_size": batch_size,
            "micro_batch_size": batch_size if micro_batch_size is None else micro_batch_size,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "checkpoint_every_steps": checkpoint_every_steps,
            "evaluation": "none",
            "samples": "none",
            "fit_memory": fit_memory,
            "report_to": [],
            "seed": seed,
        },
        "temper.train",
    )
    with ExitStack() as stack:
        if checkpoints is None:
            checkpoints = stack.enter_context(TemporaryDirectory(prefix="temper-"))
        return _trained(base, data, method, Path(checkpoints))


def _trained(base: Base, data: Data, method: Method, checkpoints: Path) -> Adapter:
    """Take the steps of the stage, without its tracker."""
    from tasks.core.errors import BadParams
    from tasks.core.memory import explain_out_of_memory
    from tasks.core.progress import Progress
    from tasks.engine.checkpoints import check_writable
    from tasks.engine.memory import adaptive_micro_batch
    from tasks.models.device import seed_everything
    from tasks.tokenization.architecture import architecture_in
    from tasks.train.batching import examples_of, kind_of_rows
    from tasks.train.trainer import HELD_OUT_ROWS, check_outcome, initial_state, prepare, train

    if base.adapter is not None:
        raise BadParams("a base that has an adapter is not trained", where=str(base.adapter), fix="merge it first")
    architecture = architecture_in(base.folder)
    kind = kind_of_rows(method.objective, architecture)
    examples = examples_of(data.train[kind], method.objective, architecture, "temper.train")
    held = data.held_out[kind][:HELD_OUT_ROWS]
    held_out = examples_of(held, method.objective, architecture, "temper.train", of_both=False) if held else []
    check_writable(checkpoints)
    fix = "set fit_memory=True, or a lower micro_batch_size"
    with (
        explain_out_of_memory(where="temper.train", fix=fix),
        adaptive_micro_batch(method.micro_batch_size, fit=method.fit_memory, checkpoints=checkpoints) as rows,
    ):
        training = prepare(base.folder, method, examples, held_out, checkpoints, rows)
        model, initial = training.model, initial_state(training.model)
        before = training.losses.held_out(held_out, method.batch_size) if held_out else None
        with Progress("train", training.plan.steps, "steps") as progress:
            seed_everything(method.seed)
            log = train(training, checkpoints, progress)
        after = training.losses.held_out(held_out, method.batch_size) if held_out else None
    check_outcome(initial, model, before or 0.0, after or 0.0)
    losses = None if before is None or after is None else (before, after)
    return Adapter(base, model.eval(), method, log, losses)
