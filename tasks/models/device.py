"""Device and dtype that this machine computes with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from tasks.core.errors import BadParams
from tasks.core.ranks import ALONE, world
from tasks.models.capability import Choices, DtypeName, choose

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COMPUTE_DTYPE = "TEMPER_COMPUTE_DTYPE"

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


def choices(where: torch.device | None = None) -> Choices:
    """Look up how is computed on a device, by default on this process's (`tasks.models.capability`).

    TEMPER_COMPUTE_DTYPE stands for the dtype of the table; it makes machines of several kinds compute alike.

    Raises:
        BadParams: the variable names no dtype to compute in.
    """
    import torch

    named: Any = os.environ.get(COMPUTE_DTYPE) or None
    if named not in (None, *get_args(DtypeName)):
        raise BadParams(
            "is no dtype to compute in",
            where=COMPUTE_DTYPE,
            got=named,
            expected=f"{', '.join(get_args(DtypeName))}, or not set",
        )
    where = where or device()
    if where.type == "cuda":
        return choose(torch.cuda.get_device_capability(where), liger=_is_installed("liger_kernel"), dtype=named)
    return choose(None, amx=has_fast_bf16(), dtype=named)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def compute_dtype() -> torch.dtype:
    """Return the dtype that this machine computes in.

    Raises:
        BadParams: TEMPER_COMPUTE_DTYPE names none.
    """
    import torch

    found: torch.dtype = getattr(torch, choices().dtype)
    return found


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 faster than fp32, if ATEN_CPU_CAPABILITY lets torch use that."""
    import torch

    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return allowed and bool(torch.cpu.get_capabilities().get(FAST_BF16))


def seed_everything(seed: int) -> None:
    """Seed every generator and select kernels: deterministic ones, and on a GPU the precision of float32 products."""
    import torch

    if device().type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if choices().tf32 else "ieee"
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # subnormal gradients slow CPU arithmetic many times over


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes that tensors have within this block, whatever autocast would choose."""
    import torch

    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Multiply float32 matrices on a device in a dtype within this block; nothing changes for float32 itself."""
    import torch

    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return what autocast computes in on a device; None where it is off."""
    import torch

    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def has_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers; an outline of one has none, be it a fake or on the meta device.

    Where that stands for an accelerator (`tasks.models.pretended_device`), storages have numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor) and (not tensor.is_meta or "numbers" in vars(tensor.untyped_storage()))


def upload(numbers: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor on a device, moved without waiting for what that has yet to do.

    A plain `.to(device)`, or `torch.tensor(..., device=device)`, waits: the GPU reads the host's memory in its turn.
    """
    import torch

    tensor = numbers if isinstance(numbers, torch.Tensor) else torch.tensor(numbers)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # which is kept until it was read
    return tensor.to(device, non_blocking=True)


_reason = ContextVar("why the host reads of the device", default="")


@contextmanager
def host_read(reason: str) -> Iterator[None]:
    """Mark where the host is meant to read numbers of the device, for which it waits until the device has made them.

    It does nothing by itself. A rehearsal (`tasks.models.pretended_device`) refuses reads outside of such blocks.
    """
    token = _reason.set(reason)
    try:
        yield
    finally:
        _reason.reset(token)


def reason_to_read() -> str:
    """Return why the host is meant to read of the device at this moment; empty if it is not."""
    return _reason.get()
