"""Evidence registered with a version, read back for the gate and for comparisons; what is missing passes no gate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tasks.core.artifacts import MANIFEST, digest, read_manifest
from tasks.core.errors import BadData, BadInput, BadParams
from tasks.core.layout import BASE_EXAMPLES, EXAMPLES
from tasks.gate.checks import VersionRecord
from tasks.registry import names as tag
from tasks.registry.client import fetch_artifact
from tasks.registry.local_reader import RegistryReader
from tasks.registry.names import ABOUT
from tasks.registry.signing import verify_model
from tasks.registry.versions import fetch_model
from tasks.reports.items import Item, by_suite, read_items

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def evidence(client: RegistryReader, version: ModelVersion) -> VersionRecord:
    """Collect all that is known of a version but for the state of its files, which `broken` tells.

    Raises:
        BadParams: its report cannot be read.
    """
    tags = version.tags
    items, base = (evaluated_items(client, version, name) for name in (EXAMPLES, BASE_EXAMPLES))
    return VersionRecord(
        version=str(version.version),
        method=tags.get(tag.METHOD, ""),
        suites=by_suite(items),
        base=by_suite(base),
        templates={
            "training": tags.get(tag.TRAINING_TEMPLATE, ""),
            "evaluation": tags.get(tag.EVALUATION_TEMPLATE, ""),
            "model": tags.get(tag.TEMPLATE_TAG, ""),
        },
        mean_kl=float(tags.get(tag.MEAN_KL, math.nan)),
        contamination=json.loads(tags.get(tag.CONTAMINATION, "{}")),
        broken="",
    )


def evaluated_items(client: RegistryReader, version: ModelVersion, name: str) -> list[Item]:
    """Read the items that a version, or its base, was evaluated on.

    Raises:
        BadParams: they are not there, or not those that were registered.
    """
    where = f"models:/{version.name}/{version.version}"
    fix = "bring back MLflow's artifacts, register it again, or take register.model to a new name"
    place, expected = version.tags.get(tag.REPORT), version.tags.get(tag.digest_of(name))
    if not place or not expected:
        raise BadParams("was registered without a report of items", where=where, fix=fix)
    with TemporaryDirectory() as folder:
        try:
            path = fetch_artifact(client, str(version.run_id), f"{place}/{name}", Path(folder))
        except OSError as error:
            raise BadParams(
                f"the report of version {version.version} cannot be read, so nothing can be compared with it",
                where=where,
                got=str(error),
                fix=fix,
            ) from error
        if digest(path) != expected:
            raise BadParams(
                "these are not the results that were registered",
                where=f"{where}: {place}/{name}",
                got=f"sha256 {digest(path)[:12]}...",
                expected=f"{expected[:12]}...",
                fix=fix,
            )
        try:
            return read_items(path)
        except BadData as error:
            raise BadParams(error.what, where=where, got=error.got, fix=fix) from error


def broken(client: MlflowClient, version: ModelVersion) -> str:
    """Describe what is wrong with a version's files; empty when they are as registered, and signed as required."""
    try:
        folder = fetch_model(client, version)
        read_manifest(folder)
        if digest(folder / MANIFEST) != version.tags.get(tag.MANIFEST_TAG):
            return "the manifest is not the one that was registered"
        verify_model(folder, folder.parent / ABOUT)
    except BadInput as error:
        return error.line()
    return ""
