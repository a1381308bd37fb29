from __future__ import annotations

import json
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadData, BadModel, BadParams, Interrupted, RegistryUnreachable
from tasks.registry.client import KEY_TAG, connect, log_params, log_rows, run_of
from tasks.registry.versions import find_version, remove_doubles, versions
from tasks.train.mlflow_logger import Tracker


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


def add_version(place: Path, model: str, key: str) -> str:
    client = connect(place)
    if not versions(client, model):
        client.create_registered_model(model)
    return str(client.create_model_version(model, str(place), tags={KEY_TAG: key}).version)


def test_a_workspace_that_was_looked_at_is_not_taken_for_the_users_wish(place: Path, tmp_path: Path) -> None:
    add_version(place, "here", "k")
    assert versions(connect(tmp_path), "here") == []
    assert len(versions(connect(place), "here")) == 1


def test_a_version_is_found_by_its_content(place: Path) -> None:
    client = connect(place)
    assert find_version(client, "found", "k1") is None
    first, second = add_version(place, "found", "k1"), add_version(place, "found", "k2")
    assert (first, second) == ("1", "2")
    found = find_version(client, "found", "k2")
    assert found is not None
    assert str(found.version) == "2"
    assert find_version(client, "found", "k3") is None


def test_a_param_that_is_too_long_for_mlflow_is_kept_whole(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 80: MLflow itself would cut it to 6,000 characters, and take 100 params at once at most."""
    client = connect(place)
    run = run_of(client, place, "key-params", "train", {})
    long = "é" * 6001
    params = {f"p{number}": number for number in range(250)} | {"targets": long, "short": "x" * 6000}
    for _ in range(2):
        log_params(client, run, params)
        run = run_of(client, place, "key-params", "train", {})
    assert len(run.data.params) == 252
    assert run.data.params["short"] == "x" * 6000
    assert run.data.params["targets"] == "6001 characters: see the artifact params/targets.txt"
    path = client.download_artifacts(run.info.run_id, "params/targets.txt", str(tmp_path))
    assert Path(path).read_text() == long
    assert capsys.readouterr().out.count("more than MLflow keeps") == 1


@pytest.mark.parametrize("store", ["./mlruns", Path("/tmp/mlruns").as_uri(), "/tmp/mlruns"])
def test_the_old_file_store_is_refused_and_how_to_migrate_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """Row 81."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(BadParams, match="file store is no longer supported") as caught:
        connect(tmp_path)
    assert caught.value.exit_code == 65
    assert "mlflow migrate-filestore --source" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_versions_are_read_past_the_first_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.registry.versions._PAGE", 2)
    for number in range(5):
        add_version(place, "many", f"k{number}")
    assert [int(version.version) for version in versions(connect(place), "many")] == [1, 2, 3, 4, 5]
    found = find_version(connect(place), "many", "k4")
    assert found is not None
    assert int(found.version) == 5


def test_content_that_was_registered_twice_is_registered_once_in_the_end(place: Path) -> None:
    client = connect(place)
    for key in ("k", "other", "k", "k"):
        add_version(place, "twice", key)
    client.set_registered_model_alias("twice", "kept", "4")  # somebody refers to it
    assert int(remove_doubles(client, "twice", "k").version) == 1
    assert [int(version.version) for version in versions(client, "twice")] == [1, 2, 4]


def test_a_retry_logs_no_step_twice_and_a_run_says_how_it_ended(place: Path) -> None:
    client = connect(place)
    for steps, error, status in (((1, 2, 3), Interrupted("x"), "KILLED"), ((3, 4), None, "FINISHED")):
        with suppress(Interrupted), Tracker(place, "key-retry", "train", {}, {}) as tracker:
            for step in steps:
                tracker.log({"step": step, "loss": 1 / step})
            if error:
                raise error
        run = run_of(client, place, "key-retry", "train", {})
        assert run.info.status == status
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def test_a_training_has_one_run_however_often_it_is_begun(place: Path) -> None:
    params = {"learning_rate": 0.1}
    for steps in ((1, 2), (3, 4)):
        with Tracker(place, "key-1", "train", {"temper.method": "m"}, params) as tracker:
            for step in steps:
                tracker.log({"step": step, "loss": 1 / step, "grad_norm": 2.0})
    client = connect(place)
    run = run_of(client, place, "key-1", "train", {})
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.25}
    assert run.data.params == {"learning_rate": "0.1"}
    assert run.data.tags["temper.method"] == "m"


def test_rows_are_logged_in_one_go(place: Path) -> None:
    client = connect(place)
    run = run_of(client, place, "key-2", "train", {})
    log_rows(client, run, [{"step": n, "loss": float(n)} for n in range(2500)])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2500


def test_a_training_goes_on_without_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Tracker(tmp_path, "k", "train", {}, {}) as tracker:
        tracker.log({"step": 1, "loss": 1.0})
    assert "not tracked in MLflow" in capsys.readouterr().out
    with pytest.raises(RegistryUnreachable) as caught:
        connect(tmp_path)
    assert caught.value.exit_code == 75


class Counting:
    """A client of MLflow that counts requests, and may be out of reach for some of them."""

    def __init__(self, client: Any, away: set[int]) -> None:
        self.client, self.away, self.names = client, away, list[str]()

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        def ask(*given: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) in self.away:
                raise MlflowException("connection refused")
            return getattr(self.client, name)(*given, **named)

        return ask


SAMPLED = [{"prompt": "Hi", "reply": "你好"}]


def long_log(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": n, "loss": 1 / n, "grad_norm": 2.0, "rate": 0.1} for n in range(1, steps + 1)
    ]
    rows[9] |= {"held_out_loss": 4.0, "samples": SAMPLED}
    rows[-1] |= {"held_out_loss": 3.0, "samples": SAMPLED}
    return rows


def counted(place: Path, monkeypatch: pytest.MonkeyPatch, away: set[int], key: str, steps: int) -> Counting:
    """A tracked training in which nothing else takes any time."""
    from tasks.train import mlflow_logger

    client = Counting(connect(place), away)
    monkeypatch.setattr(mlflow_logger, "connect", lambda workspace: client)
    monkeypatch.setattr(mlflow_logger, "_AGAIN_S", 0.05)
    monkeypatch.setattr(mlflow_logger, "_FLUSH_S", 0.05)
    data = {"train/chat.parquet": "a" * 64, "held_out/chat.parquet": "b" * 64}
    with Tracker(place, key, "train", {}, {"epochs": 1, "seed": 2}, data) as tracker:
        for row in long_log(steps):
            tracker.log(row)
        time.sleep(0.5 if away else 0)
    return client


def test_a_log_of_thousands_of_rows_takes_a_few_requests(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = counted(place, monkeypatch, set(), "key-long", 3000)
    assert client.names.count("log_batch") == 10  # 9,002 numbers, a row's together, at most 1000 in each
    assert len(client.names) < 30
    real = connect(place)
    run = run_of(real, place, "key-long", "train", {})
    assert len(real.get_metric_history(run.info.run_id, "loss")) == 3000
    assert {file.path for file in real.list_artifacts(run.info.run_id, "samples")} == {
        "samples/step-00000010.json",
        "samples/step-00003000.json",
    }
    assert run.inputs
    datasets = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert datasets == {"train/chat.parquet": "a" * 36, "held_out/chat.parquet": "b" * 36}


@pytest.mark.parametrize("away", [{1}, {4}, {9}, {10, 11}, set(range(7, 13)), set(range(1, 100))])
def test_what_mlflow_did_not_hear_is_sent_later_and_nothing_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: set[int]
) -> None:
    """It is away for some requests, or for all: by itself or through `register` it has everything in the end."""
    from tasks.register.mlflow_log import complete_run

    key = f"key-away-{min(away)}-{max(away)}"
    counted(place, monkeypatch, away, key, 700)
    monkeypatch.undo()
    client = connect(place)
    run = run_of(client, place, key, "train", {})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long_log(700)))
    summary = {
        "params": {"epochs": 1, "seed": 2},
        "data": {"train/chat.parquet": "a" * 64, "held_out/chat.parquet": "b" * 64},
        "kept_step": 10,
        "held_out_loss_after": 2.5,
    }
    for _ in range(2):
        run = run_of(client, place, key, "train", {})
        complete_run(client, run, tmp_path / "log.jsonl", summary)
    run = run_of(client, place, key, "train", {})
    assert run.data.params == {"epochs": "1", "seed": "2"}
    assert run.inputs
    assert len(run.inputs.dataset_inputs) == 2
    for name in ("loss", "grad_norm", "rate"):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(1, 701))
    history = client.get_metric_history(run.info.run_id, "held_out_loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 4.0), (700, 3.0)]
    assert run.data.metrics["held_out_loss_kept"] == 2.5
    path = client.download_artifacts(run.info.run_id, "samples/step-00000010.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == SAMPLED


def test_the_local_database_is_whole(place: Path) -> None:
    assert sqlite3.connect(place / ".temper" / "mlflow.db").execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_version_gives_its_adapter_also_where_its_model_has_it_merged(place: Path, tmp_path: Path) -> None:
    from tasks.adapters.files import PUBLISHED
    from tasks.register.mlflow_log import log_adapter
    from tasks.registry.versions import fetch_adapter

    client = connect(place)
    run = run_of(client, place, "key-adapter", "train", {})
    for name in (*PUBLISHED, "summary.json"):
        (tmp_path / name).write_text(f"the {name}")
    for _ in range(2):  # a retry logs the same again
        log_adapter(client, run, tmp_path)
    client.create_registered_model("adapted")
    version = client.create_model_version("adapted", str(place), run.info.run_id)
    client.set_registered_model_alias("adapted", "lora", version.version)
    for address in ("models:/adapted/1", "models:/adapted@lora"):
        folder = fetch_adapter(place, address)
        assert {p.name for p in folder.iterdir()} == {*PUBLISHED, "summary.json", "manifest.json"}
        assert all((folder / name).read_text() == f"the {name}" for name in PUBLISHED)
    (folder / PUBLISHED[0]).write_text("altered")
    with pytest.raises(BadData, match="was changed after it was written"):
        fetch_adapter(place, "models:/adapted/1")


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("models:/whole/1", BadModel, "this version holds no adapter"),
        ("models:/whole/2", BadModel, "this version holds no adapter"),
        ("models:/whole/3", BadParams, "the registry has no such version"),
        ("models:/whole@nobody", BadParams, "the registry has no such version"),
        ("models:/nothing/1", BadParams, "the registry has no such version"),
        ("models:/whole", BadParams, "is no version of a model"),
        ("models:/whole/latest", BadParams, "is no version of a model"),
    ],
)
def test_addresses_without_an_adapter(place: Path, address: str, error: type[Exception], said: str) -> None:
    from tasks.register.mlflow_log import log_adapter
    from tasks.registry.versions import fetch_adapter

    client = connect(place)
    if not versions(client, "whole"):
        add_version(place, "whole", "k")
        run = run_of(client, place, "key-whole", "train", {})
        log_adapter(client, run, place / "no adapter here")
        client.create_model_version("whole", str(place), run.info.run_id)
    with pytest.raises(error, match=said):
        fetch_adapter(place, address)


def test_a_registry_that_does_not_answer_has_no_adapter_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.registry.versions import fetch_adapter

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryUnreachable):
        fetch_adapter(tmp_path, "models:/m/1")
