"""The folder of a model that is named as a folder or by its address in the registry, after checking its files."""

from __future__ import annotations

from pathlib import Path

from tasks.errors import BadModel
from tasks.outputs import check_manifest

REGISTERED = "models:/"


def local_model(reference: str, workspace: Path | None) -> Path:
    """The folder of a model.

    Args:
        reference: a folder, models:/NAME/VERSION or models:/NAME@ALIAS.
        workspace: whose registry it is; by default that of the folder one stands in. A plain folder needs none.

    Raises:
        BadModel: there is no such folder, it cannot be had, or its files are not what was written.
        BadParams: the registry has no such version, or there is no workspace.
    """
    if not reference.startswith(REGISTERED):
        folder = Path(reference).resolve()
        if not folder.is_dir():
            raise BadModel(
                "there is no such folder", where=str(folder), expected="a model folder, or models:/NAME@ALIAS"
            )
        check_manifest(folder)
        return folder
    from flows.evidence import broken
    from flows.here import ready
    from tasks.registry import fetch_model, version_at
    from tasks.tracking import answering, connect

    root = ready(workspace)
    with answering(root):
        client = connect(root)
        version = version_at(client, reference)
        if wrong := broken(client, version):
            raise BadModel("its files are not what was registered", where=reference, got=wrong)
        return fetch_model(client, version)
