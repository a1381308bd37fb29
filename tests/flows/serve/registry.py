"""A registry of three versions of the pico model, whose aliases tests move."""

from __future__ import annotations

from pathlib import Path

from bench.registered import made, model_and_sources, workspace_at
from tasks.register.stage import register
from tasks.registry.client import connect

MODEL = "temper-tiny"


def three_versions(folder: Path, base: Path) -> Path:
    """A workspace with three versions and no champion."""
    workspace = workspace_at(folder / "workspace")
    for number in (1, 2, 3):
        (folder / str(number)).mkdir()
        outputs = made(folder / str(number), base, number)
        register(workspace, "qlora", outputs, f"content-{number}", *model_and_sources(workspace))
    return workspace


def give(workspace: Path, **aliases: int | None) -> None:
    """Sets aliases, or takes them away."""
    client = connect(workspace)
    for alias, number in aliases.items():
        if number is None:
            client.delete_registered_model_alias(MODEL, alias)
        else:
            client.set_registered_model_alias(MODEL, alias, str(number))
