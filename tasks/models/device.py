"""Device and dtype that this machine computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.ranks import ALONE, world

if TYPE_CHECKING:
    import torch

FAST_BF16 = "amx_bf16"
"""The CPU feature with which bf16 matrix products are several times faster than fp32 ones.

Not `avx512_bf16` alone: with it they take twice as long as in fp32 on the CPUs that were measured (bench/LOG.md).
"""


def device() -> torch.device:
    """Return the first GPU, or the CPU; of several processes on a machine each has its own GPU."""
    import torch

    if torch.cuda.is_available() and world() != ALONE:
        return torch.device("cuda", world().local_rank)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bf16 where this machine is fast at it, else fp32; never fp16, which overflows."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if has_fast_bf16() else torch.float32


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 faster than fp32."""
    import torch

    return bool(torch.cpu.get_capabilities().get(FAST_BF16))


def seed_everything(seed: int) -> None:
    """Seed every generator and select deterministic kernels."""
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # subnormal gradients slow CPU arithmetic many times over
