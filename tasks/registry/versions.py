"""The MLflow registry: versions found by content or by address, and the adapter that one holds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tasks.adapters.files import CONFIG
from tasks.core.artifacts import atomic_folder, read_manifest
from tasks.core.errors import BadModel, BadParams
from tasks.registry.alias_log import moves, one_line
from tasks.registry.client import KEY_TAG, answering, connect
from tasks.registry.local_reader import RegistryReader
from tasks.registry.names import ARTIFACT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ADAPTER = "adapter"
"""Under what name the run of a version keeps its adapter."""

_PAGE = 1000
_ADDRESS = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")


def find_version(client: RegistryReader, model: str, key: str) -> ModelVersion | None:
    """Find the version of a model that was registered from this content, if there is one."""
    return next((v for v in versions(client, model) if v.tags.get(KEY_TAG) == key), None)


def remove_doubles(client: MlflowClient, model: str, key: str) -> ModelVersion:
    """Delete this content's duplicate versions that nothing refers to; return its first version.

    MLflow has no way to make a version only if there is none, so two processes, or one that was killed in between, may
    make it twice.
    """
    same = [each for each in versions(client, model) if each.tags.get(KEY_TAG) == key]
    for double in same[1:]:
        used = {move.to for move in moves(client, model)}
        aliases = client.get_model_version(model, double.version).aliases
        if str(double.version) not in used and not aliases:
            client.delete_model_version(model, double.version)
    return same[0]


def versions(client: RegistryReader, model: str) -> list[ModelVersion]:
    """List all versions of a model, oldest first; none when the model does not exist."""
    found: list[ModelVersion] = []
    page: str | None = None
    while page is None or page:
        some = client.search_model_versions(f"name = '{model}'", max_results=_PAGE, page_token=page)
        found += some
        page = some.token or ""
    return sorted(found, key=lambda version: int(version.version))


def version_of(client: RegistryReader, model: str, number: str) -> ModelVersion:
    """Look up a version by its number.

    Raises:
        BadParams: there is none.
    """
    known = versions(client, model)
    found = next((each for each in known if str(each.version) == str(number)), None)
    if found is None:
        latest = f"latest {known[-1].version}" if known else "nothing is registered yet"
        raise BadParams(
            f"version {one_line(number)} does not exist ({latest})",
            where=model,
            fix="run `temper history` to see what there is",
        )
    return found


def version_at(client: MlflowClient, address: str) -> ModelVersion:
    """Look up the version at `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        BadParams: the address has another form, or the registry has no such version.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise BadParams(
            "is no version of a model", where=address, expected="models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    name, version, alias = found.groups()
    try:
        return client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in {
            ErrorCode.Name(code) for code in (INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST)
        }:
            raise
        raise BadParams(
            "the registry has no such version",
            where=address,
            got=str(error).split("\n")[0],
            fix="run `temper status` to see what there is",
        ) from error


def fetch_model(client: MlflowClient, version: ModelVersion) -> Path:
    """Return the model folder that a version holds: where MLflow keeps it, if that is on this disk, else downloaded.

    Raises:
        BadModel: it cannot be had.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    address = f"models:/{version.name}/{version.version}"
    try:
        source = client.get_model_version_download_uri(version.name, version.version)
        place = Path(mlflow.artifacts.download_artifacts(source, tracking_uri=client.tracking_uri))
        held = mlflow.models.Model.load(str(place)).flavors["python_function"]["artifacts"][ARTIFACT]["path"]
    except (MlflowException, OSError, KeyError) as error:
        raise BadModel(
            "its model cannot be had",
            where=address,
            got=str(error).split("\n")[0],
            fix="bring back MLflow's artifacts, or register it again",
        ) from error
    return place / str(held)


def fetch_adapter(workspace: Path, address: str) -> Path:
    """Return the adapter of a registered version, in a local folder; it is fetched once.

    Raises:
        BadParams: the registry has no such version.
        BadModel: the version holds no adapter.
        RegistryUnreachable: MLflow does not answer.
    """
    client = connect(workspace)
    with answering(workspace):
        run = version_at(client, address).run_id or ""  # one that was made by hand may have no run
        held = {PurePosixPath(file.path).name for file in client.list_artifacts(run, ADAPTER)} if run else set()
        if CONFIG not in held:
            raise BadModel(
                "this version holds no adapter",
                where=address,
                expected=f"{ADAPTER}/{CONFIG} among the artifacts of its run",
                fix="register it again; a model that was tuned whole has none",
            )
        target = workspace / ".temper" / "adapters" / run
        if not target.is_dir():
            with TemporaryDirectory() as place, atomic_folder(target, {"from": address}) as folder:
                for file in Path(client.download_artifacts(run, ADAPTER, place)).iterdir():
                    shutil.copyfile(file, folder / file.name)
    read_manifest(target)
    return target
