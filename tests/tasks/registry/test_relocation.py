"""A workspace that is moved or copied keeps its registry, and leaves that of the original alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows.run.prefect_runs import adopt_runs
from tasks.registry.client import connect
from tasks.registry.relocation import _PLACES, relocate
from tasks.registry.versions import fetch_model, versions
from tests.conftest import digests, temper


def addresses(workspace: Path) -> list[str]:
    with closing(sqlite3.connect(workspace / ".temper" / "mlflow.db")) as database:
        return [
            str(value)
            for table, column in _PLACES
            for (value,) in database.execute(f"select {column} from {table} where {column} is not null")
        ]


@pytest.fixture(scope="module")
def moved(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("elsewhere") / "一个 新的 地方"
    shutil.copytree(factory, target, symlinks=True)
    return target


def test_its_registry_leads_to_its_own_files(factory: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = hashlib.sha256((factory / ".temper" / "mlflow.db").read_bytes()).hexdigest()
    assert any(str(factory) in each or factory.as_uri() in each for each in addresses(moved))
    client = connect(moved)
    assert f"this workspace was at {factory}" in capsys.readouterr().err
    found = addresses(moved)
    assert not [each for each in found if str(factory) in each or factory.as_uri() in each]
    assert sum(moved.as_uri() in each or str(moved) in each for each in found) >= 6
    for version in versions(client, "temper-tiny"):
        model = fetch_model(client, version)
        assert moved in model.parents
        name = version.tags["temper.method"]
        assert digests(model, ".") == {
            file.removeprefix(f"data/models/{name}/"): sha256
            for file, sha256 in digests(moved, f"data/models/{name}").items()
        }
    connect(moved)
    assert capsys.readouterr().err == ""  # it is said once
    assert hashlib.sha256((factory / ".temper" / "mlflow.db").read_bytes()).hexdigest() == original


def test_its_runs_are_its_own_in_prefect_too(factory: Path, moved: Path) -> None:
    adopt_runs(moved)
    with closing(sqlite3.connect(moved / ".temper" / "prefect" / "prefect.db")) as database:
        runs = [json.loads(given) for (given,) in database.execute("select parameters from flow_run")]
    assert {run["workspace"] for run in runs if "workspace" in run} == {str(moved)}


def test_the_command_line_goes_on_there(moved: Path) -> None:
    said = temper(moved, "run")
    assert "nothing has changed since the last run" in said.stdout


def test_a_workspace_without_a_registry_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".temper" / "artifacts").mkdir(parents=True)
    database = tmp_path / ".temper" / "mlflow.db"
    assert relocate(tmp_path, database, "temper") is None
    sqlite3.connect(database).close()
    assert relocate(tmp_path, database, "temper") is None
