"""Bases in 4 or 8 bits, as bitsandbytes holds them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tasks.core.errors import BadModel
from tasks.models.device import host_read

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

_WIDEST_GAP = 0.34
"""Between neighbouring levels of NF4 (0.304) and FP4 (0.333), of the largest number of a block."""


class Quantization(NamedTuple):
    """The form in which bitsandbytes holds the weights of a base.

    Attributes:
        kind: NormalFloat or floating point in 4 bits (arXiv:2305.14314), or integers in 8 (arXiv:2208.07339).
        double: whether the scales of 4-bit blocks are quantized too.
        compute_dtype: of products with 4-bit weights; `auto`: what this machine is fast at.
        outlier_threshold: hidden values beyond it are multiplied in 16 bits, with 8-bit weights.
    """

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = False
    compute_dtype: str = "auto"
    outlier_threshold: float = 6.0


def loading_config(quantization: Quantization, usual: torch.dtype) -> Any:
    """Return what transformers loads a quantized base by; `usual` is what `auto` computes in."""
    import torch
    from transformers import BitsAndBytesConfig

    if quantization.kind == "int8":
        # bitsandbytes says at every product that it works in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.outlier_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=usual
        if quantization.compute_dtype == "auto"
        else getattr(torch, quantization.compute_dtype),
    )


def prepare_for_training(model: PreTrainedModel, quantization: Quantization) -> None:
    """Prepare a quantized base for training.

    Raises:
        BadModel: this machine reads its weights back wrongly.
    """
    _keep_trainable(model)
    if quantization.kind != "int8":
        _check_four_bit(model, quantization)


def dequantized(model: PreTrainedModel | PeftModel) -> dict[str, Callable[[], Tensor]]:
    """Return functions that dequantize the weights of a model to float32 when called, by their names in the base."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.weight": partial(_stands_for, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def _stands_for(module: Linear4bit | Linear8bitLt) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit

    if isinstance(module, Linear4bit):
        with host_read("what a weight stands for"):
            four: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state).float().cpu()
        return four
    # the first forward pass moves both from the weight to the module's state
    packed = module.weight.data if module.weight.CB is None else module.weight.CB
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    with host_read("what a weight stands for"):
        eight: Tensor = int8_vectorwise_dequant(packed, scales).float().cpu()
    return eight


def _keep_trainable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward pass in eval mode.

    On CPUs with AVX512-BF16 it does so for good, and the packed product has no gradient: a training that evaluates its
    held-out loss first would then learn next to nothing, with no more than a warning (bench/LOG.md).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_four_bit(model: PreTrainedModel, quantization: Quantization) -> None:
    """Refuse widths whose 4-bit weights bitsandbytes reads back wrongly.

    On CPUs with AVX-512, version 0.50.2 does so, silently, for widths that are multiples of 16 but not of 64 (688, say;
    bench/LOG.md). What is read back of random numbers is compared with the widest gap between 4-bit levels.

    Raises:
        BadModel: the model has such a width on this machine.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    widths = {module.in_features for module in model.modules() if isinstance(module, Linear4bit)}
    for width in sorted(widths):
        weights = torch.randn(3 * 64, width, generator=torch.Generator().manual_seed(0)).to(model.device)
        packed, state = functional.quantize_4bit(weights, quant_type=quantization.kind)
        off = (functional.dequantize_4bit(packed, state) - weights).abs() / weights.abs().max()
        if off.max() > _WIDEST_GAP:
            raise BadModel(
                f"bitsandbytes reads 4-bit weights of width {width} back wrongly on this machine",
                got=f"off by {off.max():.2f} of the largest weight",
                expected=f"at most {_WIDEST_GAP}, such as with widths that are multiples of 64",
                fix="train on a GPU, or choose a base with other widths",
            )
