"""LoRA's update (Hu et al. 2021, arXiv:2106.09685) added to what a layer gives, in one pass forwards and one backwards.

PEFT computes result + (x A^T) B^T * s as it is written: a product as large as the layer's output is made, scaled in a
second pass and added in a third, and its gradient is scaled in a fourth. Here the product is added to the result as it
is made, and what is scaled is only as wide as the rank (what that gains: bench/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tasks.models.device import autocast_dtype


def add_in_one_pass(model: PeftModel, name: str = "default") -> None:
    """Let plain LoRA layers of an adapter add their updates in one pass; variants such as DoRA stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear | Linear4bit | Linear8bitLt) and name not in module.lora_variant:
            module.lora_variant[name] = InOnePass()


class InOnePass(LoraVariant):  # type: ignore[misc, unused-ignore]
    """Plain LoRA as PEFT merges it, computed in one pass where it can be."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **more: Any) -> None:
        """Do nothing, as nothing needs to be set up."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the update."""
        return orig_weight + _delta(module, active_adapter, orig_weight)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update to the weight."""
        orig_weight.data += _delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the update."""
        return orig_weight - _delta(module, active_adapter, orig_weight)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **more: Any) -> Tensor:
        """Add the update of the inputs `x` (..., in) to what the layer gives, `result` (..., out)."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x, scaling = module.lora_dropout[active_adapter](x), module.scaling[active_adapter]
        alike = x.dtype == a.weight.dtype == result.dtype and autocast_dtype(x.device) is None
        plain = a.bias is None and b.bias is None and result.is_contiguous()
        # without gradients it is PEFT's arithmetic to the bit: that of the model that is served
        if not (torch.is_grad_enabled() and alike and plain):
            update = b(a(x)) * scaling
            as_peft: Tensor = result + (update if isinstance(module, Linear) else update.to(result.dtype))
            return as_peft
        if result._is_view():  # of what another function made: autograd would not have it changed in place
            result = result.clone()
        updated: Tensor = _Update.apply(result, x, a.weight, b.weight, scaling)  # type: ignore[no-untyped-call]
        return updated


def _delta(module: LoraLayer, name: str, weight: Tensor) -> Tensor:
    delta: Tensor = module.get_delta_weight(name)
    return delta.to(weight.dtype)


class _Update(Function):
    """result + (x A^T) B^T * s, in the memory of `result`; x (..., in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x.reshape(-1, x.shape[-1]) @ a.t()
        result.view(-1, result.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        given = upstream.reshape(-1, upstream.shape[-1])
        to_low = (given @ b).mul_(ctx.scaling)
        to_x = (to_low @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return upstream, to_x, to_low.t() @ x.reshape(-1, x.shape[-1]), (given.t() @ low).mul_(ctx.scaling), None
