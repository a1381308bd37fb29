"""Training-side parts of AdaLoRA (arXiv:2303.10512); its layers are PEFT's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tasks.models.device import host_read

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


def freeze_ranks(model: PeftModel) -> None:
    """Freeze the number that updates are divided by: PEFT lets it be trained, and does not save it."""
    for name, number in model.named_parameters():
        if ".ranknum." in name:
            number.requires_grad_(False)


def take_ranks(model: PeftModel, name: str) -> None:
    """Give a fresh adapter the ranks that a published one was left with.

    PEFT does so when it puts the tensors in, but then in the number format of the base.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config: Any = model.peft_config[name]
    if config.rank_pattern:
        model.base_model.resize_modules_by_rank_pattern(config.rank_pattern, name)
        cast_adapter_dtype(model.base_model, adapter_name=name, autocast_adapter_dtype=True)
        config.rank_pattern = None


def orthogonality_penalty(model: PeftModel) -> Tensor:
    """Compute how far the singular vectors are from orthogonal, a scalar: the mean Frobenius norm of P P^T - I.

    Equation 4 of the paper, as PEFT has it: the mean over all matrices and the norm, not the sum and its square.
    """
    norms = []
    for name, matrix in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            rows = matrix if ".lora_A." in name else matrix.T
            norms.append(torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
    return torch.stack(norms).mean()


class RankSteps:
    """Moves ranks after each step of the optimizer before it; to the loop it is one more optimizer.

    What it knows of the weights' importance goes into checkpoints as an optimizer's state does: for each matrix the
    averages of sensitivity and uncertainty (equations 9 and 10), for each update which of its ranks are left.
    """

    def __init__(self, model: PeftModel, step: int = 0) -> None:
        self._tuner = model.base_model
        self._allocator = self._tuner.rankallocator
        self._config: Any = model.peft_config["default"]
        self._taken = step
        self.param_groups: list[dict[str, Any]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There is nothing to clear."""

    def step(self) -> None:
        """Weigh the last gradients and take ranks away where the plan says so."""
        self._taken += 1
        with host_read("which ranks are taken away"):
            self._tuner.update_and_allocate(self._taken)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors by the number of their matrix, in the order of names; -1 is what belongs to none."""
        averages, doubts = self._allocator.exp_avg_ipt, self._allocator.exp_avg_unc
        state: dict[int, dict[str, Any]] = {-1: {"taken": torch.tensor(self._taken)}}
        for number, name in enumerate(self._names()):
            if name in averages:
                state[number] = {"sensitivity": averages[name], "uncertainty": doubts[name]}
            if name in (self._config.rank_pattern or {}):
                state.setdefault(number, {})["left"] = torch.tensor(self._config.rank_pattern[name])
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        names, state = self._names(), dict(state_dict["state"])
        self._taken = int(state.pop(-1)["taken"])
        self._allocator.reset_ipt()
        left = {}
        for number, kept in state.items():
            if "sensitivity" in kept:
                self._allocator.ipt[names[number]] = torch.zeros_like(kept["sensitivity"])
                self._allocator.exp_avg_ipt[names[number]] = kept["sensitivity"].clone()
                self._allocator.exp_avg_unc[names[number]] = kept["uncertainty"].clone()
            if "left" in kept:
                left[names[number]] = kept["left"].tolist()
        self._config.rank_pattern = left or None

    def _names(self) -> list[str]:
        return sorted(name for name, _ in self._tuner.model.named_parameters() if "lora_" in name)
