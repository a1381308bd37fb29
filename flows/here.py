"""Where a command works: the workspace that it stands in or is given, and paths as they are seen from there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tasks import graph

Workspace = Annotated[
    Path | None, typer.Option("--workspace", help="Work on this folder instead of the one found upward from here.")
]


def enter(given: Path | None) -> Path:
    """The workspace as an absolute path, which becomes the present folder: stages take their paths from there."""
    root = graph.find_workspace((given or Path.cwd()).resolve())
    os.chdir(root)
    return root


def ready(given: Path | None, *, terminal: bool = True) -> Path:
    """The same, with the settings of its servers in place."""
    from flows import servers

    root = enter(given)
    servers.prepare(root, terminal=terminal)
    return root


def seen_from_here(reference: str) -> str:
    """A reference to an adapter; a path is made absolute before the workspace becomes the present folder."""
    from tasks.adapter_sources import is_folder

    return str(Path(reference).resolve()) if is_folder(reference) else reference
