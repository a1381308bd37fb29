"""The MLflow registry: versions found by content, and the ledger of what has been champion.

MLflow overwrites aliases and keeps no history. So every move of the champion alias is first written as a numbered tag
of the registered model, which is only ever added to; replaying the tags gives the present champion and the ones
before it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from tasks.adapter_files import CONFIG
from tasks.errors import BadModel, BadParams
from tasks.outputs import read_manifest, whole_folder
from tasks.tracking import KEY_TAG, answering, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
ADAPTER = "adapter"
"""Under what name the run of a version keeps its adapter."""

_MOVE = "temper.move."
_ADDRESS = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")


class Move(NamedTuple):
    """One move of the champion alias: a promotion puts `to` on top of the stack, a rollback takes `before` off it."""

    number: int
    action: str
    before: str
    to: str
    at: str
    by: str


def find_version(client: MlflowClient, model: str, key: str) -> ModelVersion | None:
    """The version of a model that was registered from this content, if there is one."""
    return next((v for v in versions(client, model) if v.tags.get(KEY_TAG) == key), None)


def versions(client: MlflowClient, model: str) -> list[ModelVersion]:
    """All versions of a model, oldest first; none when the model does not exist."""
    found = client.search_model_versions(f"name = '{model}'", max_results=1000)
    return sorted(found, key=lambda version: int(version.version))


def version_at(client: MlflowClient, address: str) -> ModelVersion:
    """The version at `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

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


def fetch_adapter(workspace: Path, address: str) -> Path:
    """The adapter of a registered version, in a local folder; it is fetched once.

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
            with TemporaryDirectory() as place, whole_folder(target, {"from": address}) as folder:
                for file in Path(client.download_artifacts(run, ADAPTER, place)).iterdir():
                    shutil.copyfile(file, folder / file.name)
    read_manifest(target)
    return target


def moves(client: MlflowClient, model: str) -> list[Move]:
    """The ledger of a model, oldest move first."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        tags = client.get_registered_model(model).tags
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise  # a server that does not answer is no empty ledger
        return []
    return sorted(Move(**json.loads(value)) for name, value in tags.items() if name.startswith(_MOVE))


def champions(ledger: Sequence[Move]) -> list[str]:
    """The stack of champions after these moves: the last is the present one, a rollback returns to the one before."""
    stack: list[str] = []
    for move in ledger:
        if move.action == "promote":
            stack.append(move.to)
        else:
            stack.pop()
    return stack


def withdrawn(ledger: Sequence[Move]) -> set[str]:
    """The versions that were rolled back and have not been made champion again since."""
    gone: set[str] = set()
    for move in ledger:
        gone.discard(move.to)
        if move.action == "rollback":
            gone.add(move.before)
    return gone


def move_champion(client: MlflowClient, model: str, action: str, to: str) -> Move:
    """Writes a move into the ledger, then makes the alias agree with it.

    Args:
        client: of the registry.
        model: the registered model's name.
        action: `promote` or `rollback`.
        to: the version that is champion afterwards.
    """
    import getpass
    from datetime import UTC, datetime

    ledger = moves(client, model)
    before = (champions(ledger) or [""])[-1]
    at = datetime.now(UTC).isoformat(timespec="seconds")
    move = Move(len(ledger) + 1, action, before, to, at, getpass.getuser())
    client.set_registered_model_tag(model, f"{_MOVE}{move.number:06d}", json.dumps(move._asdict()))
    settle_champion(client, model)
    return move


def champion_of(client: MlflowClient, model: str) -> str | None:
    """The version that the ledger says is champion."""
    stack = champions(moves(client, model))
    return stack[-1] if stack else None


def settle_champion(client: MlflowClient, model: str) -> str | None:
    """Makes the champion alias agree with the ledger, which a kill may have kept apart; returns the version."""
    version = champion_of(client, model)
    if version and str(client.get_registered_model(model).aliases.get(CHAMPION)) != version:
        client.set_registered_model_alias(model, CHAMPION, version)
    return version
