"""The reader of MLflow's file against MLflow's own client on the same file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tasks.core.errors import BadInput
from tasks.registry.alias_log import champion_of, ledger_name, move_champion, moves
from tasks.registry.client import KEY_TAG, connect, connect_to_read, fetch_artifact, run_of
from tasks.registry.local_reader import LocalRegistry
from tasks.registry.versions import find_version, versions

MODEL = "one"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions, one of which was deleted, of a model beside another; two moves; an artifact."""
    place = tmp_path_factory.mktemp("registry of 1 #")
    client = connect(place)
    run = run_of(client, place, "a key", "train", {"temper.kind": "test"})
    client.log_text(run.info.run_id, "héllo", "reports/said.txt")
    for name in (MODEL, "another"):
        client.create_registered_model(name, tags={"of": name})
        for key in ("k1", "k2", "k3"):
            tags = {KEY_TAG: f"{key} of {name}"}
            client.create_model_version(name, str(place), run_id=run.info.run_id if key == "k1" else None, tags=tags)
    client.delete_model_version(MODEL, "2")
    for version in ("1", "3"):
        move_champion(client, MODEL, moves(client, MODEL), "promote", version, reason=f"for {version}")
    return place


def test_it_answers_what_mlflows_client_answers(place: Path) -> None:
    mlflows, own = connect(place), connect_to_read(place)
    assert isinstance(own, LocalRegistry)
    for name in (MODEL, "another", "none such"):
        for one, other in zip(versions(own, name), versions(mlflows, name), strict=True):
            for field in ("name", "creation_timestamp", "tags"):
                assert getattr(one, field) == getattr(other, field)
            assert (str(one.version), one.run_id or None) == (str(other.version), other.run_id or None)
        assert moves(own, name) == moves(mlflows, name)
        assert champion_of(own, name) == champion_of(mlflows, name)
    for name in (MODEL, "another"):
        mine, theirs = own.get_registered_model(name), mlflows.get_registered_model(name)
        assert mine.tags == theirs.tags == {"of": name}
        assert mine.aliases == {alias: str(version) for alias, version in theirs.aliases.items()}
    assert [str(each.version) for each in versions(own, MODEL)] == ["1", "3"]
    assert champion_of(own, MODEL) == "3"
    found = find_version(own, MODEL, f"k3 of {MODEL}")
    assert found is not None


def test_an_artifact_is_read_where_it_lies(place: Path, tmp_path: Path) -> None:
    mlflows, own = connect(place), connect_to_read(place)
    (run,) = {str(each.run_id) for each in versions(own, MODEL) if each.run_id}
    for client in (own, mlflows):
        assert fetch_artifact(client, run, "reports/said.txt", tmp_path).read_text() == "héllo"
        with pytest.raises(OSError, match="none"):
            fetch_artifact(client, run, "reports/none.txt", tmp_path)
    assert list(tmp_path.rglob("*.txt"))  # MLflow's client brought it there
    with pytest.raises(OSError, match="no run"):
        fetch_artifact(own, "f" * 32, "reports/said.txt", tmp_path)


def test_a_registry_that_is_not_there_yet_is_empty_and_stays_so(tmp_path: Path) -> None:
    own = connect_to_read(tmp_path)
    assert (versions(own, MODEL), moves(own, MODEL)) == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_was_deleted_is_no_empty_one(place: Path) -> None:
    client = connect(place)
    experiment = client.get_experiment_by_name(ledger_name(MODEL))
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    for reader in (client, connect_to_read(place)):
        with pytest.raises(BadInput, match="was deleted in MLflow"):
            moves(reader, MODEL)
    client.restore_experiment(experiment.experiment_id)
    assert champion_of(connect_to_read(place), MODEL) == "3"


def test_other_tables_and_other_registries_are_asked_through_mlflow(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".temper").mkdir()
    database = tmp_path / ".temper" / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("create table alembic_version (version_num varchar(32))")
    asked: list[Path] = []
    monkeypatch.setattr("tasks.registry.client.connect", asked.append)
    connect_to_read(tmp_path)
    database.write_bytes(b"no database at all" * 100)
    connect_to_read(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    connect_to_read(place)
    assert asked == [tmp_path, tmp_path, place]


def test_reading_imports_neither_mlflow_nor_what_it_brings(place: Path) -> None:
    said = f"""
import sys
from pathlib import Path
from flows.cli import console, main, registry_console
from flows.registry import history, promotion
from flows.run import last_run, status
from tasks.registry.alias_log import champion_of
from tasks.registry.client import answering, connect_to_read
with answering(Path({str(place)!r})):
    print(champion_of(connect_to_read(Path({str(place)!r})), {MODEL!r}))
print(sorted({{"mlflow", "prefect", "pandas", "sqlalchemy", "torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "[]"]
