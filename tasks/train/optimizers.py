"""The optimizers of params: PyTorch's AdamW, those of bitsandbytes, which take less memory, and schedule-free AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.models.device import choices
from tasks.train.params import Method, OptimizerName

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_OF_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion": "Lion",
    "lion_8bit": "Lion8bit",
}


def optimizer_for(model: nn.Module, method: Method) -> Optimizer:
    """Build the optimizer of all that is trainable."""
    return optimizer_of(method.optimizer, groups_of(model, method))


def groups_of(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    """Group the trainable parameters by their weight decay."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # angles say how far a rotation is from where it began: decayed, it would be drawn back there
    angles = [p for name, p in parameters.items() if name.endswith(".angles")]
    others = [p for name, p in parameters.items() if not name.endswith(".angles")]
    return [{"params": others, "weight_decay": method.weight_decay}, {"params": angles, "weight_decay": 0.0}]


def optimizer_of(name: OptimizerName, groups: Sequence[dict[str, Any]]) -> Optimizer:
    """Build an optimizer over groups of parameters, each with its `weight_decay`; the loop sets the learning rate.

    AdamW is arXiv:1711.05101, its form with states in 8 bits arXiv:2110.02861, paged states are those of
    arXiv:2305.14314 (section 3), Lion is arXiv:2302.06675. Paged states move to the host when a GPU's memory is full;
    where there is no GPU they are plain ones, and this says so. Schedule-free AdamW is arXiv:2405.15682 by its authors'
    library: what it is evaluated and published at is an average of its steps (`tasks.engine.loop.Averaging`).
    """
    groups = [group for group in groups if group["params"]]
    best = choices(groups[0]["params"][0].device)
    if name == "adamw":
        import torch

        return torch.optim.AdamW(groups, fused=best.fused_optimizer or None)
    if name == "adamw_schedule_free":
        from schedulefree import AdamWScheduleFree

        averaging: Optimizer = AdamWScheduleFree(groups)
        return averaging
    import bitsandbytes.optim

    made: Optimizer = getattr(bitsandbytes.optim, _OF_BITSANDBYTES[name])(groups)
    if name.startswith("paged") and not best.paged_states:
        print(f"{name}: there is no GPU to page from; the states stay in this machine's memory", flush=True)
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return made
