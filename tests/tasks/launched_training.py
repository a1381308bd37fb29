"""Short trainings for tests/tasks/test_distributed.py, as `accelerate launch` starts them: one after another.

Arguments: the base, the folder where each leaves its log and adapter, and names of trainings below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tasks import distributed, sharding
from tasks.adapted import fresh, publish
from tasks.device import settle
from tasks.losses import held_out_loss
from tasks.process import quiet_libraries
from tasks.progress import Progress
from tasks.train import train
from tasks.watch import HELD_OUT_LOSS, Look, Watch
from tests.samples import ADALORA, DPO, KTO, LORA, LOREFT, ORPO, QLORA, SFT, method
from tests.tasks.test_train import examples

EXACT = {**QLORA, "compute_dtype": "float32"}
SMALL = {"micro_batch_rows": 2, "epochs": 2}
METHODS = {
    "sft": method(LORA, SFT, **SMALL),
    "orpo": method(LORA, ORPO, **SMALL),
    "kto": method(LORA, KTO, **SMALL),
    "dpo": method(LORA, DPO, **SMALL),
    "adalora": method({**ADALORA, "final_steps": 0}, SFT, **SMALL),
    "reft": method(LOREFT, SFT, **SMALL),
    "qlora": method(EXACT, SFT, **SMALL),
    "dropout": method({**LORA, "dropout": 0.5}, SFT, **SMALL),
}
ROWS = 11
"""In steps of four: the last of an epoch has three, which two processes cannot share evenly."""


def training(base: Path, name: str, folder: Path) -> None:
    """Six steps, with a look at five held-out rows every two, and a checkpoint every two."""
    params, rows = METHODS[name], examples(name, ROWS)
    settle(params.seed)
    model = fresh(base, params.adapter, 6).float().train()  # in bf16 sums of parts differ by more than is asked for
    if sharding.is_asked():
        sharding.shard(model)
    settle(params.seed)
    watch = Watch([Look(HELD_OUT_LOSS, 2, lambda: held_out_loss(model, rows[:5], params))])
    log = train(model, rows, params, folder / name / "checkpoints", Progress(name, 6, "steps"), watch=watch)
    if distributed.is_first():
        publish(model, folder / name)
    place = folder / name / f"log-{distributed.world().rank}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(log))
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    place.with_name(f"held-{distributed.world().rank}.json").write_text(json.dumps(held))


def main() -> None:
    """The trainings that the command line names."""
    quiet_libraries()
    torch.set_num_threads(1)
    base, folder, *names = sys.argv[1:]
    with distributed.group():
        for name in names:
            training(Path(base), name, Path(folder))


if __name__ == "__main__":
    main()
