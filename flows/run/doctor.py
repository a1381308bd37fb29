"""Checks of what is installed here, what this machine can do, and which servers answer."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from tasks.core.errors import TemperError
from tasks.registry.client import connect, tracking_uri

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "lm-eval",
    "prefect",
    "mlflow",
    "dvc",
    "great-expectations",
)
_GIB = 2**30


class Diagnosis(NamedTuple):
    """One line of the examination; `good` is None for a mere fact."""

    subject: str
    found: str
    good: bool | None = None


def diagnose(workspace: Path) -> list[Diagnosis]:
    """Check everything that a run needs."""
    return [*_software(), *_machine(workspace), *_servers(workspace)]


def _software() -> list[Diagnosis]:
    findings = [Diagnosis("python", platform.python_version(), True)]
    for package in PACKAGES:
        try:
            findings.append(Diagnosis(package, version(package), True))
        except PackageNotFoundError:
            findings.append(Diagnosis(package, "is not installed; run `make install`", False))
    return findings


def _machine(workspace: Path) -> list[Diagnosis]:
    import psutil
    import torch

    from tasks.models.device import choices, device, has_fast_bf16

    where, best = device(), choices()
    kernels = {
        f"{best.head} head": True,
        "fused optimizer": best.fused_optimizer,
        "paged states": best.paged_states,
        "TF32": best.tf32,
        "scaled loss": best.scales_loss,
    }
    free, memory = shutil.disk_usage(workspace).free / _GIB, psutil.virtual_memory()
    return [
        Diagnosis(
            "device", torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        ),
        Diagnosis("AMX", "yes" if has_fast_bf16() else "no"),
        Diagnosis("computes in", f"{best.dtype}, {', '.join(name for name, used in kernels.items() if used)}"),
        Diagnosis(
            "memory",
            f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
            memory.available > 2 * _GIB,
        ),
        Diagnosis("disk", f"{free:.1f} GiB free at {workspace}", free > 2),
    ]


def _servers(workspace: Path) -> list[Diagnosis]:
    findings = []
    try:
        connect(workspace)
        findings.append(Diagnosis("MLflow", f"answers: {tracking_uri(workspace)}", True))
    except TemperError as error:
        findings.append(Diagnosis("MLflow", str(error).replace("\n", " "), False))
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        return [*findings, Diagnosis("Prefect", "a temporary server for each run (PREFECT_API_URL is not set)")]
    import httpx

    try:
        answers = httpx.get(f"{api}/health", timeout=5).is_success
    except httpx.HTTPError:
        answers = False
    return [*findings, Diagnosis("Prefect", f"{'answers' if answers else 'does not answer'}: {api}", answers)]
