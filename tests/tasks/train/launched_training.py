"""Short trainings for tests/tasks/engine/test_collectives.py, one after another, as `accelerate launch` starts them.

Arguments: the base, the folder where each leaves its log and adapter, and names of trainings below; after `sharded`
they are trained on a base whose weights are sharded.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.adapters.attach import init_adapter, save_adapter
from tasks.core import ranks
from tasks.core.progress import Progress
from tasks.core.stage import quiet_libraries
from tasks.engine import collectives
from tasks.engine.evaluation_hooks import EvalHook, EvalHooks
from tasks.models.device import seed_everything
from tasks.models.loader import Model
from tasks.reports.training_log import HELD_OUT_LOSS
from tasks.train import fsdp
from tests.helpers.samples import ADALORA, DPO, KTO, LORA, LOREFT, ORPO, QLORA, SFT, method
from tests.helpers.training import held_out_loss, train
from tests.tasks.train.test_trainer import examples

SMALL = {"micro_batch_size": 2, "epochs": 2}
METHODS = {
    "sft": method(LORA, SFT, **SMALL),
    "orpo": method(LORA, ORPO, **SMALL),
    "kto": method(LORA, KTO, **SMALL),
    "dpo": method(LORA, {**DPO, "reference": "precomputed"}, **SMALL),
    "adalora": method({**ADALORA, "final_steps": 0}, SFT, **SMALL),
    "reft": method(LOREFT, SFT, **SMALL),
    "qlora": method({**QLORA, "compute_dtype": "float32"}, SFT, **SMALL),
    "dropout": method({**LORA, "dropout": 0.5}, SFT, **SMALL),
}
ROWS = 11
"""In steps of four: the last of an epoch has three, which two processes cannot share evenly."""
SHARDED = "sharded"
STOPPED = "dropout, stopped after three steps"


def training(base: Path, name: str, folder: Path, stop_after: int = 0) -> None:
    """Six steps, with a look at five held-out rows every two; the first process publishes."""

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == stop_after:
            raise KeyboardInterrupt

    params, rows = METHODS[name], examples(name, ROWS)
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter, 6).float().train()  # in bf16 the order of sums would tell
    if ranks.shards_weights():
        fsdp.shard_weights(model)
    seed_everything(params.seed)
    watch = EvalHooks([EvalHook(HELD_OUT_LOSS, 2, lambda: held_out_loss(model, rows[:5], params))])
    log = train(model, rows, params, folder / "checkpoints", Progress(name, 6, "steps"), on_row, watch=watch)
    if ranks.is_first():
        save_adapter(model, folder)
    note = {"log": log, "held": numbers_held(model), "drawn": torch.rand(1).item()}
    (folder / f"process-{ranks.world().rank}.json").write_text(json.dumps(note))


def numbers_held(model: Model) -> int:
    """How many numbers of a model this process has in memory."""
    return sum(local(parameter).numel() for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """What is here of a tensor that may be sharded."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def main() -> None:
    """The trainings that the command line names."""
    torch.set_num_threads(1)
    base, folder, *names = sys.argv[1:]
    with collectives.group():
        for name in names:
            if name == SHARDED:
                os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            elif name == STOPPED:
                with suppress(KeyboardInterrupt):
                    training(Path(base), "dropout", Path(folder) / name, stop_after=3)
                training(Path(base), "dropout", Path(folder) / name)
            else:
                place = f"{SHARDED}-{name}" if ranks.shards_weights() else name
                training(Path(base), name, Path(folder) / place)


if __name__ == "__main__":
    quiet_libraries()
    main()
