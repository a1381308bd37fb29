"""The records of a registered version in MLflow: tags, report, adapter, model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks.adapters.files import CONFIG, PUBLISHED
from tasks.adapters.package import BASE_FOLDER, REFERENCE, base_in, is_of_hub
from tasks.core.artifacts import as_json
from tasks.core.layout import BASE_EXAMPLES, CLONE, EXAMPLES, LINEAGE, METRICS
from tasks.publish.model_card import CARD, version_card
from tasks.register.lineage import StagePaths
from tasks.register.sbom import SBOM, sbom
from tasks.registry import names as tag
from tasks.registry.client import KEPT_LOSS, KEY_TAG, flat, log_data, log_params, log_rows, log_samples, logged_steps
from tasks.registry.names import ABOUT, ARTIFACT
from tasks.registry.signing import SIGNATURE, sign, signing_key
from tasks.registry.versions import ADAPTER
from tasks.serving.signature import requirements, serving_spec

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


DESCRIPTION_CHARACTERS = 5000
"""What MLflow's database has room for."""


def tags_of(lineage: Mapping[str, Any], place: str, *, signed: bool) -> dict[str, str]:
    """Build the tags of a version: its identity, its scores, where it comes from, and what the gate reads.

    Args:
        lineage: all that is known of it.
        place: where its report is among the artifacts of its run.
        signed: whether its files were signed.
    """
    suites, templates, files = lineage["evaluation"]["suites"], lineage["templates"], lineage["files"]
    return {
        KEY_TAG: lineage["key"],
        tag.METHOD: lineage["method"],
        tag.TRAIN_KEY: lineage["training"]["key"],
        tag.GIT_COMMIT: lineage["git_commit"],
        tag.MANIFEST_TAG: lineage["manifest_sha256"],
        tag.WEIGHTS_TAG: ",".join(sha256 for name, sha256 in files.items() if name.endswith(".safetensors")),
        tag.BASE_WEIGHTS: str(lineage["base"]["weights_sha256"]),
        tag.TRAINING_TEMPLATE: templates["training"] or "none",
        tag.EVALUATION_TEMPLATE: templates["evaluation"] or "none",
        tag.TEMPLATE_TAG: templates["model"] or "none",
        tag.MEAN_KL: repr(lineage["merge"]["mean_kl"]),
        tag.CONTAMINATION: json.dumps(lineage["contamination"], sort_keys=True),
        tag.REPORT: place,
        tag.LINEAGE_TAG: f"{place}/{LINEAGE}",
        tag.SIGNED: str(signed).lower(),
        **{tag.digest_of(name): sha256 for name, sha256 in lineage["evaluation"]["files"].items()},
        **{tag.score_of(suite): f"{found['score']['mean']:.6f}" for suite, found in suites.items()},
    }


def describe(lineage: Mapping[str, Any], model: Path, folder: Path) -> Path:
    """Write what goes with a model: its card, lineage, SBOM and, where there is a key, signature."""
    folder.mkdir()
    (folder / CARD).write_text(version_card(lineage), encoding="utf-8")
    (folder / LINEAGE).write_text(as_json(lineage), encoding="utf-8")
    (folder / SBOM).write_text(sbom(), encoding="utf-8")
    if key := signing_key():
        sign(model, folder / SIGNATURE, key)
    return folder


def complete_run(client: MlflowClient, run: Run, log: Path, summary: Mapping[str, Any]) -> None:
    """Send to the run what the training could not, or what DVC's cache gave: params, digests of the data, the log."""
    log_params(client, run, flat(summary["params"]))
    log_data(client, run, summary["data"])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    sent = logged_steps(client, run)
    log_rows(client, run, [row for row in rows if row["step"] not in sent])
    log_samples(client, run, rows)
    if KEPT_LOSS not in run.data.metrics:
        log_rows(client, run, [{"step": summary["kept_step"], KEPT_LOSS: summary["held_out_loss_after"]}])


def log_adapter(client: MlflowClient, run: Run, adapter: Path) -> None:
    """Log the adapter itself to the run; methods that tune the model whole have none."""
    if (adapter / CONFIG).is_file():
        for name in (*PUBLISHED, "summary.json"):
            client.log_artifact(run.info.run_id, str(adapter / name), ADAPTER)


def log_figures(client: MlflowClient, run: Run, lineage: Mapping[str, Any], cost: Path) -> None:
    """Log the scores on all suites as metrics, and what they cost, where that was measured."""
    figures = {f"score.{suite}": found["score"]["mean"] for suite, found in lineage["evaluation"]["suites"].items()}
    if cost.is_file():
        told = json.loads(cost.read_text())
        figures |= {f"cost.{name}": value for name, value in told.items() if isinstance(value, (int, float))}
    for name, value in figures.items():
        if run.data.metrics.get(name) != value:
            client.log_metric(run.info.run_id, name, value)


def log_report(client: MlflowClient, run: Run, made: StagePaths, about: Path, key: str) -> str:
    """Log the report and the description to the run, in a separate folder for this content; return its place.

    A training that is evaluated again has another version, whose report must not take the place of this one's.
    """
    place = f"versions/{key[:12]}"
    with TemporaryDirectory() as folder:
        shutil.copyfile(made.baseline, Path(folder) / BASE_EXAMPLES)
        for file in (made.reports / METRICS, made.reports / EXAMPLES, Path(folder) / BASE_EXAMPLES, *about.iterdir()):
            client.log_artifact(run.info.run_id, str(file), place)
    return place


def log_model(client: MlflowClient, run: Run, model: Path, about: Path | None, key: str) -> tuple[str, str]:
    """Log the model's artifacts to MLflow, once for this content; return their id and their URI.

    Args:
        client: of the tracking server.
        run: that it belongs to.
        model: its folder.
        about: the folder with its description, named ABOUT; None for a model without one.
        key: of the content.
    """
    import mlflow
    from mlflow.entities import LoggedModelStatus

    for found in client.search_logged_models([run.info.experiment_id], f"tags.`{KEY_TAG}` = '{key}'"):
        if found.status == LoggedModelStatus.READY:
            return found.model_id, found.model_uri
    serving, artifacts = serving_spec(model), {ARTIFACT: str(model)}
    if about:
        artifacts[ABOUT] = str(about)
    if (model / REFERENCE).is_file() and not is_of_hub(model):
        artifacts[BASE_FOLDER] = str(base_in(model))
    signed = about is not None and (about / SIGNATURE).is_file()
    with mlflow.start_run(run_id=run.info.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(serving.code),
            code_paths=[str(CLONE / "tasks")],
            artifacts=artifacts,
            signature=serving.signature,
            input_example=serving.example,
            pip_requirements=requirements(signed=signed),
            tags={KEY_TAG: key},
        )
    return info.model_id, info.model_uri


def ensure_model(client: MlflowClient, model: str) -> None:
    """Create a registered model if the registry does not have it yet."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
