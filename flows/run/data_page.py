"""The profile of a run's data in MLflow: one run per state of the data, with its page and its drift since the last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks.core import pipeline
from tasks.core.artifacts import as_json, atomic_write
from tasks.registry.client import EXPERIMENT, KEY_TAG, answering, connect, run_of
from tasks.validate.profile import drift, profile_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NUMBERS = "data/validation/profile.json"
DATA_PAGE = "profile.html"
WRITTEN_PAGE = Path(".temper", "pages", "data.html")
_KIND = {"temper.kind": "data"}
_DRIFT = "drift."
"""What the names of the metrics begin with that say how far a column moved."""


def publish_data_page(client: MlflowClient, workspace: Path) -> Run | None:
    """Log what `validate` measured, unless this state of the data is logged already.

    Returns:
        The MLflow run of this state of the data; None when nothing was validated yet.
    """
    key = pipeline.recorded_keys(workspace).get("validate")
    if key is None or not (workspace / NUMBERS).is_file():
        return None
    run = run_of(client, workspace, key, "validate", _KIND)
    if run.info.status == "FINISHED":
        return run
    numbers = json.loads((workspace / NUMBERS).read_text())
    before = _last(client, run)
    moved = drift(numbers, before) if before else {}
    for name, value in numbers["rows"].items():
        client.log_metric(run.info.run_id, f"rows.{name}", value)
    for name, index in moved.items():
        client.log_metric(run.info.run_id, f"{_DRIFT}{name}", index)
    client.log_text(run.info.run_id, as_json(numbers), "profile.json")
    client.log_text(run.info.run_id, profile_page(numbers, moved), DATA_PAGE)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run


def write_data_page(workspace: Path, live: Mapping[str, Any]) -> Path:
    """Write the page of the data with the drift of what is asked; return its path.

    Args:
        workspace: in which `validate` ran.
        live: a drift as JSON has it, and what drifted, as `reasons`.
    """
    path = workspace / WRITTEN_PAGE
    atomic_write(path, profile_page(json.loads((workspace / NUMBERS).read_text()), live=live))
    return path


def _last(client: MlflowClient, run: Run) -> dict[str, Any] | None:
    """Load the profile that was logged last before this one."""
    query = (
        f"tags.`temper.kind` = 'data' and attributes.run_id != '{run.info.run_id}' and attributes.status = 'FINISHED'"
    )
    found = client.search_runs([run.info.experiment_id], query, max_results=1, order_by=["attributes.end_time DESC"])
    if not found:
        return None
    with TemporaryDirectory() as folder:
        numbers: dict[str, Any] = json.loads(
            Path(client.download_artifacts(found[0].info.run_id, "profile.json", folder)).read_text()
        )
    return numbers


def logged_drift(workspace: Path) -> dict[str, float]:
    """Read how far this state of the data had moved from the one before, by column; empty where it was not logged."""
    key, client = pipeline.recorded_keys(workspace).get("validate"), connect(workspace)
    with answering(workspace):
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if key is None or experiment is None:
            return {}
        found = client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    metrics = found[0].data.metrics if found else {}
    return {name.removeprefix(_DRIFT): value for name, value in metrics.items() if name.startswith(_DRIFT)}
