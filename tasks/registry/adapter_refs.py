"""Sources of adapters, each as one text: a folder, a repository of the hub, or a version of the registry."""

from __future__ import annotations

import re
from pathlib import Path

from tasks.adapters.files import CONFIG, PICKLE, PUBLISHED, WEIGHTS
from tasks.core.errors import BadModel, BadParams
from tasks.core.hub import snapshot
from tasks.core.params import COMMIT, HUB_NAME
from tasks.registry.versions import fetch_adapter

ADAPTER_REF_FORMS = "a folder, hub:OWNER/NAME@COMMIT, models:/NAME/VERSION or models:/NAME@ALIAS"
"""What a reference may look like."""

_HUB, _REGISTRY = "hub:", "models:/"


def is_folder(reference: str) -> bool:
    """Return whether a reference is a path; it is then seen from where the user stands."""
    return not reference.startswith((_HUB, _REGISTRY))


def fetch_adapter_ref(reference: str, workspace: Path) -> Path:
    """Find the local folder of an adapter.

    Args:
        reference: in one of FORMS.
        workspace: whose MLflow a `models:/` address is of.

    Raises:
        BadParams: the reference has no such form, or names nothing that there is.
        BadModel: what it names is no adapter.
        Transient: the hub or MLflow does not answer.
    """
    if reference.startswith(_HUB):
        return _from_hub(reference)
    if reference.startswith(_REGISTRY):
        return fetch_adapter(workspace, reference)
    if not Path(reference).is_dir():
        raise BadParams("there is no such folder", where=reference, expected=ADAPTER_REF_FORMS)
    return Path(reference)


def _from_hub(reference: str) -> Path:
    name, _, revision = reference.removeprefix(_HUB).partition("@")
    if not re.fullmatch(HUB_NAME, name):
        raise BadParams("is no name on the hub", where=reference, got=name, expected="hub:OWNER/NAME@COMMIT")
    if not re.fullmatch(COMMIT, revision):
        raise BadParams(
            "is not pinned: branches and tags move",
            where=reference,
            got=revision or "no revision",
            expected="the whole hash of a commit, 40 hexadecimal digits",
            fix=f"take it from the page of {name}, under its commits",
        )
    folder = snapshot(name, revision, (*PUBLISHED, "README.md"), kind="model")
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        raise BadModel(
            "is no adapter that temper reads",
            where=reference,
            got=f"no {' and no '.join(missing)}",
            expected=f"{CONFIG} and {WEIGHTS}; pickle weights ({PICKLE}) are refused",
        )
    return folder
