"""The MLflow run of a training: found by the content key of the stage, so that a retry continues it.

A tracker never stands in the way of a training. It works in a thread of its own; when MLflow does not answer it says
so once and asks again now and then, and the training log, an output of the stage, keeps every row. `register` completes
the run from it. Where several processes train, only the first tracks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from tasks.core.errors import BadParams, RegistryUnreachable
from tasks.registry.local_reader import LocalRegistry, RegistryReader, reads
from tasks.registry.relocation import ARTIFACTS, relocate
from tasks.reports.training_log import SAMPLES, numbers_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


EXPERIMENT = "temper"
KEY_TAG = "temper.key"

KEPT_LOSS = "held_out_loss_kept"
"""The metric that is the held-out loss of the weights that were kept."""

_PARAM_CHARACTERS = 6000
"""What MLflow keeps of a param."""

_BATCH_METRICS = 1000
"""What MLflow takes in one request."""


def tracking_uri(workspace: Path) -> str:
    """Return the MLflow server that MLFLOW_TRACKING_URI names, or a SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_database(workspace)}"


def local_database(workspace: Path) -> Path | None:
    """Return the SQLite file that is the workspace's whole registry; None where the environment names another."""
    elsewhere = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_WORKSPACE", "MLFLOW_ENABLE_WORKSPACES")
    return None if any(name in os.environ for name in elsewhere) else _database(workspace)


def _database(workspace: Path) -> Path:
    return workspace.resolve() / ".temper" / "mlflow.db"


def connect(workspace: Path) -> MlflowClient:
    """Connect to the workspace's MLflow; return a client.

    Raises:
        BadParams: it is a folder of files, as MLflow kept runs before it had databases.
        RegistryUnreachable: it does not answer.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking._tracking_service import utils

    uri, given = tracking_uri(workspace), os.environ.get("MLFLOW_TRACKING_URI")
    if urlsplit(uri).scheme in ("", "file"):
        raise BadParams(
            "MLflow's file store is no longer supported",
            where=f"MLFLOW_TRACKING_URI={uri}",
            expected="sqlite:///FILE, or the address of a server",
            fix=f"mlflow migrate-filestore --source {urlsplit(uri).path} --target sqlite:///mlflow.db",
        )
    try:
        with _one_at_a_time(workspace):  # two processes that make the schema of a new SQLite file at once break it
            if given is None:
                _relocate(workspace)
            if mlflow.get_tracking_uri() != uri:  # it knows folders by the ids of runs, which a copy has as well
                utils._artifact_repos_cache.clear()
            mlflow.set_tracking_uri(uri)
            if given is None:  # MLflow writes it there, where it would pass for the user's wish for other workspaces
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            client = mlflow.MlflowClient(uri)
            client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise RegistryUnreachable(
            "MLflow does not answer",
            where=uri,
            got=str(error).split("\n")[0],
            fix="start the server, or unset MLFLOW_TRACKING_URI",
        ) from error
    return client


def connect_to_read(workspace: Path) -> RegistryReader:
    """Connect to the workspace's MLflow for reports: to its file alone, without importing MLflow, where that does.

    Raises:
        BadParams: as `connect`.
        RegistryUnreachable: as `connect`.
    """
    database = local_database(workspace)
    if database is None or not reads(database):
        return connect(workspace)
    if database.is_file():
        with _one_at_a_time(workspace):
            _relocate(workspace)
    return LocalRegistry(database)


def fetch_artifact(client: RegistryReader, run_id: str, path: str, folder: Path) -> Path:
    """Return the path of an artifact of a run: where it lies, or in a folder that it is brought to.

    Raises:
        OSError: it cannot be had.
    """
    try:
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except Exception as error:
        if isinstance(error, OSError) or not _is_mlflows(error):
            raise
        raise OSError(str(error).split("\n")[0]) from error


def _relocate(workspace: Path) -> None:
    if moved := relocate(workspace, _database(workspace), EXPERIMENT):
        print(moved, file=sys.stderr, flush=True)


def _is_mlflows(error: Exception) -> bool:
    """Return whether it is an error of MLflow's, which nothing raises before MLflow is imported."""
    known = sys.modules.get("mlflow.exceptions")
    return known is not None and isinstance(error, known.MlflowException)


@contextmanager
def _one_at_a_time(workspace: Path) -> Iterator[None]:
    (workspace / ".temper").mkdir(mode=0o700, exist_ok=True)
    with FileLock(workspace / ".temper" / "mlflow.lock"):
        yield


def run_of(client: MlflowClient, workspace: Path, key: str, name: str, tags: Mapping[str, str]) -> Run:
    """Find the run with this content key; create it when there is none."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment:
        experiment_id = experiment.experiment_id
    else:
        local = tracking_uri(workspace).startswith("sqlite")
        location = (workspace.resolve() / ARTIFACTS).as_uri() if local else None
        shown_as = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on its page for agents
        experiment_id = client.create_experiment(EXPERIMENT, artifact_location=location, tags=shown_as)
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if found:
        return found[0]
    return client.create_run(experiment_id, run_name=name, tags={**tags, KEY_TAG: key})


def log_rows(client: MlflowClient, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows of a training log as metrics; every number but `step` becomes one.

    The numbers of a row go in one request: a step that has a loss in MLflow has everything.
    """
    import time

    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    batch: list[Metric] = []
    for row in rows:
        metrics = [Metric(name, value, now, row["step"]) for name, value in numbers_of(row).items()]
        if len(batch) + len(metrics) > _BATCH_METRICS:
            client.log_batch(run.info.run_id, metrics=batch)
            batch = []
        batch += metrics
    if batch:
        client.log_batch(run.info.run_id, metrics=batch)


def log_samples(client: MlflowClient, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the samples of each row of a training log as a separate artifact, if the run does not have it yet."""
    with_samples = [row for row in rows if row.get(SAMPLES)]
    there = {file.path for file in client.list_artifacts(run.info.run_id, SAMPLES)} if with_samples else set()
    for row in with_samples:
        path = f"{SAMPLES}/step-{row['step']:08d}.json"
        if path not in there:
            client.log_text(run.info.run_id, json.dumps(row[SAMPLES], indent=2, ensure_ascii=False), path)


def log_data(client: MlflowClient, run: Run, data: Mapping[str, str]) -> None:
    """Log what a training read: the SHA-256 of each file by its path below data/rendered.

    The path begins with the split. MLflow has room for 36 characters of a digest; to log the same again does nothing.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for path, sha256 in data.items():
        source = json.dumps({"uri": f"data/rendered/{path}", "sha256": sha256}, sort_keys=True)
        dataset = Dataset(name=path, digest=sha256[:36], source_type="local", source=source)
        context = "training" if path.startswith("train/") else "evaluation"
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    client.log_inputs(run.info.run_id, inputs)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names, as MLflow logs params."""
    items: dict[str, Any] = {}
    for key, item in value.items():
        items |= flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item}
    return items


def log_params(client: MlflowClient, run: Run, params: Mapping[str, Any]) -> None:
    """Log the params that the run does not have yet; MLflow refuses to change one.

    One that is too long for MLflow, which would cut it, becomes an artifact that the param names.
    """
    for name in params.keys() - run.data.params.keys():
        value, place = str(params[name]), f"params/{name}.txt"
        if len(value) > _PARAM_CHARACTERS:
            client.log_text(run.info.run_id, value, place)
            print(f"{name} has {len(value)} characters, more than MLflow keeps of a param: see {place}", flush=True)
            value = f"{len(value)} characters: see the artifact {place}"
        client.log_param(run.info.run_id, name, value)


def logged_steps(client: MlflowClient, run: Run) -> set[int]:
    """Return the steps of the training log that the run has."""
    return {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")}


@contextmanager
def answering(workspace: Path) -> Iterator[None]:
    """Turn MLflow's failures to answer, within the block, into one error that names the cause.

    Raises:
        RegistryUnreachable: the server did not answer, or answered that it is in trouble itself.
    """
    in_trouble = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    try:
        yield
    except Exception as error:
        if not _is_mlflows(error) or getattr(error, "error_code", "") not in in_trouble:
            raise
        raise RegistryUnreachable(
            "MLflow stopped answering", where=tracking_uri(workspace), got=str(error).split("\n")[0], fix="run it again"
        ) from error
