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


class Finding(NamedTuple):
    """One line of the examination; `good` is None for a mere fact."""

    subject: str
    found: str
    good: bool | None = None


def examine(workspace: Path) -> list[Finding]:
    """Check everything that a run needs."""
    return [*_software(), *_machine(workspace), *_servers(workspace)]


def _software() -> list[Finding]:
    findings = [Finding("python", platform.python_version(), True)]
    for package in PACKAGES:
        try:
            findings.append(Finding(package, version(package), True))
        except PackageNotFoundError:
            findings.append(Finding(package, "is not installed; run `make install`", False))
    return findings


def _machine(workspace: Path) -> list[Finding]:
    import psutil
    import torch

    from tasks.models.device import FAST_BF16, compute_dtype, device, has_fast_bf16

    fast, where = has_fast_bf16(), device()
    free, memory = shutil.disk_usage(workspace).free / _GIB, psutil.virtual_memory()
    return [
        Finding(
            "device", torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        ),
        Finding("AMX", "yes" if fast else "no"),
        Finding("bf16", f"fast ({FAST_BF16 if fast else ''})" if fast or where.type == "cuda" else "slow here"),
        Finding("computes in", str(compute_dtype()).removeprefix("torch.")),
        Finding(
            "memory",
            f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
            memory.available > 2 * _GIB,
        ),
        Finding("disk", f"{free:.1f} GiB free at {workspace}", free > 2),
    ]


def _servers(workspace: Path) -> list[Finding]:
    findings = []
    try:
        connect(workspace)
        findings.append(Finding("MLflow", f"answers: {tracking_uri(workspace)}", True))
    except TemperError as error:
        findings.append(Finding("MLflow", str(error).replace("\n", " "), False))
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        return [*findings, Finding("Prefect", "a temporary server for each run (PREFECT_API_URL is not set)")]
    import httpx

    try:
        answers = httpx.get(f"{api}/health", timeout=5).is_success
    except httpx.HTTPError:
        answers = False
    return [*findings, Finding("Prefect", f"{'answers' if answers else 'does not answer'}: {api}", answers)]
