"""One short training as a process of its own, for tests/tasks/train/test_kills.py to kill.

Whatever a training imports late is imported here at once: processes are forked from one that has it all.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import tasks.adapters.bottleneck
import tasks.adapters.reft.tuner  # noqa: F401
from tasks.adapters.attach import init_adapter, save_adapter
from tasks.core.progress import Progress
from tasks.core.stage import quiet_libraries
from tasks.engine.evaluation_hooks import EvalHook, EvalHooks
from tasks.models.device import seed_everything
from tasks.reports.training_log import HELD_OUT_LOSS
from tests.helpers.samples import LOREFT, ORPO, QLORA, SFT, method
from tests.helpers.training import held_out_loss, train
from tests.tasks.train.test_trainer import examples

DROPOUT = {"dropout": 0.1}
CHANGES = {"epochs": 8, "optimizer": "adamw", "checkpoint_every_steps": 3}
METHODS = {
    "qlora": method({**QLORA, **DROPOUT}, SFT, **CHANGES),
    "orpo": method({**QLORA, **DROPOUT}, ORPO, **CHANGES),
    "reft": method({**LOREFT, **DROPOUT}, SFT, **CHANGES),
}


def training(base: str, name: str, folder: str) -> None:
    """Trains and publishes into `folder`/adapter; 24 steps, a checkpoint every three, the best weights kept."""
    quiet_libraries()
    torch.set_num_threads(1)
    params, rows, place = METHODS[name], examples(name), Path(folder)
    seed_everything(params.seed)
    model = init_adapter(Path(base), params.adapter, 24)
    seed_everything(params.seed)
    model.train()
    watch = EvalHooks(
        [EvalHook(HELD_OUT_LOSS, 4, lambda: held_out_loss(model, rows[:4], params))], None, keep_best=True
    )
    train(model, rows, params, place / "checkpoints", Progress(name, 24, "steps"), watch=watch)
    (place / "adapter").mkdir(exist_ok=True)
    save_adapter(model, place / "adapter")
