"""The Python API: fine-tune, merge, evaluate and export models from a notebook, in any folder.

    import temper

    rows = temper.read_rows("chats.jsonl")
    base = temper.load_model("models/tiny")
    data = temper.render(rows, base, max_tokens=512)
    adapter = temper.train(base, data, temper.LoRA(rank=16, alpha=32), temper.SFT(), batch_size=32)
    adapter.save("adapter")
    temper.merge(base, "adapter", "merged")
    report = temper.evaluate("merged", suites=["exam.csv"])
    temper.export("merged", "gguf", kind="gguf", dtype="q8_0")

Every function is a thin adapter around what the stages and commands use, and gives what they give. Importing this
package imports no library: each name is resolved when it is first asked for. Errors are of one tree, `TemperError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.core.errors import (
        BadData,
        BadInput,
        BadModel,
        BadParams,
        Diverged,
        NotEquivalent,
        OutOfMemory,
        TemperError,
    )
    from temper._data import Data, read_rows, render
    from temper._folders import evaluate, export, merge
    from temper._methods import DPO, KTO, ORPO, SFT, Full, LoRA, QLoRA, ReFT, SimPO
    from temper._models import AdapterPool, Base, generate, load_model
    from temper._training import Adapter, train
    from temper._workspace import Run, Workspace

_PLACES = {
    "tasks.core.errors": (
        "BadData", "BadInput", "BadModel", "BadParams", "Diverged", "NotEquivalent", "OutOfMemory", "TemperError"
    ),
    "temper._data": ("Data", "read_rows", "render"),
    "temper._folders": ("evaluate", "export", "merge"),
    "temper._methods": ("DPO", "KTO", "ORPO", "SFT", "Full", "LoRA", "QLoRA", "ReFT", "SimPO"),
    "temper._models": ("AdapterPool", "Base", "generate", "load_model"),
    "temper._training": ("Adapter", "train"),
    "temper._workspace": ("Run", "Workspace"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "DPO", "KTO", "ORPO", "SFT", "Adapter", "AdapterPool", "BadData", "BadInput", "BadModel", "BadParams", "Base",
    "Data", "Diverged", "Full", "LoRA", "NotEquivalent", "OutOfMemory", "QLoRA", "ReFT", "Run", "SimPO", "TemperError",
    "Workspace", "evaluate", "export", "generate", "load_model", "merge", "read_rows", "render", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from its module, the first time that it is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted(__all__)
