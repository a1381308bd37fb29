"""The place of a command: its workspace, paths as they are seen from there, and the folder of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tasks.core import pipeline
from tasks.core.artifacts import check_manifest
from tasks.core.errors import BadModel

WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", help="Work on this folder instead of the one found upward from here.")
]


def enter(given: Path | None) -> Path:
    """Return the workspace as an absolute path, and make it the current folder: stages take their paths from there."""
    root = pipeline.find_workspace((given or Path.cwd()).resolve())
    os.chdir(root)
    return root


def ready(given: Path | None, *, terminal: bool = True) -> Path:
    """Enter the workspace as `enter` does, and set the environment of its servers."""
    from flows.run import prefect_server

    root = enter(given)
    prefect_server.prepare_servers(root, terminal=terminal)
    return root


def seen_from_here(reference: str) -> str:
    """Return a reference to an adapter; make a path absolute before the workspace becomes the current folder."""
    from tasks.registry.adapter_refs import is_folder

    return str(Path(reference).resolve()) if is_folder(reference) else reference


REGISTRY_SCHEME = "models:/"


def local_model(reference: str, workspace: Path | None) -> Path:
    """Return the folder of a model.

    Args:
        reference: a folder, models:/NAME/VERSION or models:/NAME@ALIAS.
        workspace: whose registry it is; by default that of the folder one stands in. A plain folder needs none.

    Raises:
        BadModel: there is no such folder, it cannot be had, or its files are not what was written.
        BadParams: the registry has no such version, or there is no workspace.
    """
    if not reference.startswith(REGISTRY_SCHEME):
        folder = Path(reference).resolve()
        if not folder.is_dir():
            raise BadModel(
                "there is no such folder", where=str(folder), expected="a model folder, or models:/NAME@ALIAS"
            )
        check_manifest(folder)
        return folder
    from flows.registry.evidence import broken
    from tasks.registry.client import answering, connect
    from tasks.registry.versions import fetch_model, version_at

    root = ready(workspace)
    with answering(root):
        client = connect(root)
        version = version_at(client, reference)
        if wrong := broken(client, version):
            raise BadModel("its files are not what was registered", where=reference, got=wrong)
        return fetch_model(client, version)
