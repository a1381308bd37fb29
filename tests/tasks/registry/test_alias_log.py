"""The ledger: written once, read back in order, and never by two at the same place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bench.registry import add_versions, race, serving
from tasks.core.errors import AliasMoved, BadInput
from tasks.registry.alias_log import (
    REASON_CHARACTERS,
    Move,
    champion_of,
    champions,
    ledger_name,
    move_champion,
    moves,
    settle_champion,
    withdrawn,
)
from tasks.registry.client import connect
from tasks.registry.names import CHAMPION


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return connect(tmp_path_factory.mktemp("ledger"))


def step(client: MlflowClient, model: str, action: str, to: str, **told: str) -> Move:
    return move_champion(client, model, moves(client, model), action, to, **told)


def alias(client: MlflowClient, model: str) -> str:
    return str(client.get_registered_model(model).aliases.get(CHAMPION))


def test_the_ledger_remembers_every_champion_and_why(client: MlflowClient) -> None:
    add_versions(client, "told", 3)
    assert champion_of(client, "told") is None
    for version in ("1", "2", "3"):
        step(client, "told", "promote", version, reason=f"because\n of {version}", verdict="ab", summary="+0.1")
    step(client, "told", "rollback", "2")
    assert alias(client, "told") == "2"
    ledger = moves(client, "told")
    assert [(m.number, m.action, m.before, m.to) for m in ledger] == [
        (1, "promote", "", "1"),
        (2, "promote", "1", "2"),
        (3, "promote", "2", "3"),
        (4, "rollback", "3", "2"),
    ]
    assert ledger[0].reason == "because of 1"
    assert (ledger[0].verdict, ledger[0].summary) == ("ab", "+0.1")
    assert champions(ledger) == ["1", "2"]
    assert withdrawn(ledger) == {"3"}


def test_a_move_decided_on_an_older_ledger_is_refused(client: MlflowClient) -> None:
    add_versions(client, "raced", 5)
    step(client, "raced", "promote", "3")
    seen = moves(client, "raced")
    step(client, "raced", "promote", "5")
    with pytest.raises(AliasMoved, match="alias moved from v3 to v5 meanwhile") as caught:
        move_champion(client, "raced", seen, "promote", "4")
    assert caught.value.exit_code == 75
    assert [move.to for move in moves(client, "raced")] == ["3", "5"]
    assert alias(client, "raced") == "5"


class LosingAnswers:
    """A client whose request to write an entry arrives, but whose answer is lost."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_param(self, *given: Any) -> None:
        self._client.log_param(*given)
        raise MlflowException("the connection was closed")


def test_an_entry_whose_answer_was_lost_is_known_again(client: MlflowClient) -> None:
    add_versions(client, "lossy", 1)
    step(cast(MlflowClient, LosingAnswers(client)), "lossy", "promote", "1")
    assert [move.to for move in moves(client, "lossy")] == ["1"]
    assert alias(client, "lossy") == "1"


def test_nobody_can_change_an_entry(client: MlflowClient) -> None:
    add_versions(client, "fixed", 1)
    step(client, "fixed", "promote", "1")
    experiment = client.get_experiment_by_name(ledger_name("fixed"))
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        client.log_param(run.info.run_id, "move.000001", "another")


def test_a_kill_between_ledger_and_alias_is_mended(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    add_versions(client, "killed", 2)
    step(client, "killed", "promote", "1")
    with monkeypatch.context() as patch:
        patch.setattr("tasks.registry.alias_log.settle_champion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step(client, "killed", "promote", "2")
    assert alias(client, "killed") == "1"
    assert settle_champion(client, "killed") == "2"
    assert alias(client, "killed") == "2"


def test_the_stack_of_champions() -> None:
    def ledger(*steps: str) -> list[Move]:
        return [
            Move(n, "rollback" if step.startswith("-") else "promote", "", step.lstrip("-"), "", "")
            for n, step in enumerate(steps, 1)
        ]

    assert champions([]) == []
    assert champions(ledger("1", "2", "-1")) == ["1"]
    assert champions(ledger("1", "2", "-1", "3", "2", "-3", "-1")) == ["1"]
    assert champions(ledger("1", "2", "1", "3", "-1")) == ["1", "2", "1"]
    assert champions(ledger("1", "2", "3", "4", "-2", "5")) == ["1", "2", "5"]
    assert withdrawn(ledger("1", "2")) == set()
    assert withdrawn(ledger("1", "2", "3", "4", "-2")) == {"3", "4"}
    assert withdrawn(ledger("1", "2", "3", "-1", "3")) == {"2"}


def test_the_ledger_of_earlier_versions_is_taken_over(client: MlflowClient) -> None:
    """They kept it as tags of the registered model."""
    add_versions(client, "old", 3)
    before = [
        {"number": 1, "action": "promote", "before": "", "to": "1", "at": "2026-10-01T00:00:00+00:00", "by": "x"},
        {"number": 2, "action": "promote", "before": "1", "to": "2", "at": "2026-10-02T00:00:00+00:00", "by": "x"},
    ]
    for entry in before:
        client.set_registered_model_tag("old", f"temper.move.{entry['number']:06d}", json.dumps(entry))
    assert [move.to for move in moves(client, "old")] == ["1", "2"]
    step(client, "old", "promote", "3")
    client.delete_registered_model_tag("old", "temper.move.000001")  # the entries are the ledger's now
    assert [(m.number, m.to, m.at) for m in moves(client, "old")][:2] == [
        (n, str(n), before[n - 1]["at"]) for n in (1, 2)
    ]
    assert champions(moves(client, "old")) == ["1", "2", "3"]


def test_a_deleted_ledger_is_no_empty_one(client: MlflowClient) -> None:
    add_versions(client, "gone", 1)
    step(client, "gone", "promote", "1")
    experiment = client.get_experiment_by_name(ledger_name("gone"))
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(BadInput, match="was deleted"):
        moves(client, "gone")


def test_a_server_that_does_not_answer_is_no_empty_ledger() -> None:
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, RESOURCE_DOES_NOT_EXIST

    class Answers:
        def __init__(self, code: int) -> None:
            self.code = code

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def get_registered_model(self, name: str) -> None:
            raise MlflowException("x", self.code)

    assert moves(cast(MlflowClient, Answers(RESOURCE_DOES_NOT_EXIST)), "m") == []
    with pytest.raises(MlflowException):
        moves(cast(MlflowClient, Answers(INTERNAL_ERROR)), "m")


def test_a_long_reason_is_cut_before_mlflow_would_cut_the_entry(client: MlflowClient) -> None:
    add_versions(client, "long", 1)
    step(client, "long", "promote", "1", reason="\x00\u2028" + '"' * 9000)
    (move,) = moves(client, "long")
    assert move.reason == '"' * REASON_CHARACTERS


def test_an_entry_that_is_missing_is_said(client: MlflowClient) -> None:
    add_versions(client, "holes", 1)
    step(client, "holes", "promote", "1")
    experiment = client.get_experiment_by_name(ledger_name("holes"))
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    client.log_param(run.info.run_id, "move.000003", "{}")
    with pytest.raises(BadInput, match="lacks entries") as caught:
        moves(client, "holes")
    assert caught.value.examples == ("move.000002",)


# --- several writers at once ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server")) as uri:
        yield uri


def test_of_several_writers_each_wins_in_turn_and_no_move_is_lost(tmp_path: Path) -> None:
    """F16 of 1,000 moves: python -m bench.registry ledger"""
    found = race(f"sqlite:///{tmp_path / 'mlflow.db'}", "m", writers=3, each=5)
    assert found.entries == 15
    assert found.linear
    assert found.won == [5, 5, 5]
    assert found.alias == found.champion


def test_so_it_is_through_a_server(server: str) -> None:
    found = race(server, "m", writers=3, each=4)
    assert found.entries == 12
    assert found.linear
    assert found.won == [4, 4, 4]
    assert found.alias == found.champion
