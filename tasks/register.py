"""Registers a model in MLflow with its evidence and its lineage, once for the same content.

Reads:  data/models/METHOD/, data/reports/METHOD/ and the base model's examples, data/adapters/METHOD/, data/base/,
        data/rendered/ (what was learnt is looked through for evaluation items).
Writes: a version of `register.model` with the alias `challenger` and an alias named like the method; in it the model,
        its card, lineage, bill of materials and, with a key, signature; in its run the report and the adapter, also
        where the model has it merged; data/reports/METHOD/registered.json (model, version, run, key).
Params: register, ingest.sources
Fails:  MLflow does not answer (75, retried); a signing key that cannot be used (65, never retried).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks import process
from tasks import version_tags as tag
from tasks.adapter_files import CONFIG, PUBLISHED
from tasks.bill import BILL, bill_of_materials
from tasks.cards import CARD, version_card
from tasks.evaluate import METRICS
from tasks.items import EXAMPLES
from tasks.journal import STATE, cost_file
from tasks.lineage import BASE_EXAMPLES, LINEAGE, Outputs, lineage_of
from tasks.names import ABOUT, ARTIFACT, CHALLENGER
from tasks.outputs import as_json, write_whole
from tasks.packaged import BASE, REFERENCE, base_in, is_of_hub
from tasks.params import Params
from tasks.registry import ADAPTER, find_version, remove_doubles
from tasks.serving import requirements, serving_of
from tasks.signatures import SIGNATURE, sign, signing_key
from tasks.tracking import (
    KEPT_LOSS,
    KEY_TAG,
    answering,
    connect,
    flat,
    log_data,
    log_params,
    log_rows,
    log_samples,
    logged_steps,
    run_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_DESCRIPTION_CHARACTERS = 5000
"""What MLflow's database has room for."""


def register(workspace: Path, method: str, made: Outputs, key: str, params: Params) -> ModelVersion:
    """The version of this content: found, or made with everything that belongs to it.

    Every step looks first whether an earlier attempt did it, and the version itself is made last, with its tags, in one
    request: a kill anywhere leaves either no version or a whole one. Of two who make it at once the one with the higher
    number takes its own away again: numbers are given one after the other, so it sees the other.
    """
    client, model = connect(workspace), params.register_.model
    if found := find_version(client, model, key):
        remove_doubles(client, model, key)
        return found
    lineage = lineage_of(workspace, method, made, key, params)
    run = run_of(client, workspace, lineage["training"]["key"], f"train {method}", {tag.METHOD: method})
    summary = json.loads((made.adapter / "summary.json").read_text())
    complete_run(client, run, made.adapter / "log.jsonl", summary)
    log_figures(client, run, lineage, cost_file(workspace / STATE, method))
    log_adapter(client, run, made.adapter)
    with TemporaryDirectory() as folder:
        about = describe(lineage, made.model, Path(folder) / ABOUT)
        place = log_report(client, run, made, about, key)
        signed = (about / SIGNATURE).is_file()
        model_id, uri = log_model(client, run, made.model, about, key)
    client.set_terminated(run.info.run_id)
    _ensure_model(client, model)
    client.create_model_version(
        model,
        uri,
        run.info.run_id,
        tags=tags_of(lineage, place, signed=signed),
        description=version_card(lineage)[:_DESCRIPTION_CHARACTERS],
        model_id=model_id,
    )
    return remove_doubles(client, model, key)


def tags_of(lineage: Mapping[str, Any], place: str, *, signed: bool) -> dict[str, str]:
    """What a version says of itself: its identity, its scores, where it comes from, and what the gate asks for.

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
        tag.MANIFEST: lineage["manifest_sha256"],
        tag.WEIGHTS: ",".join(sha256 for name, sha256 in files.items() if name.endswith(".safetensors")),
        tag.BASE_WEIGHTS: str(lineage["base"]["weights_sha256"]),
        tag.TRAINING_TEMPLATE: templates["training"] or "none",
        tag.EVALUATION_TEMPLATE: templates["evaluation"] or "none",
        tag.TEMPLATE: templates["model"] or "none",
        tag.MEAN_KL: repr(lineage["merge"]["mean_kl"]),
        tag.LEAKED: json.dumps(lineage["leaked"], sort_keys=True),
        tag.REPORT: place,
        tag.LINEAGE: f"{place}/{LINEAGE}",
        tag.SIGNED: str(signed).lower(),
        **{tag.digest_of(name): sha256 for name, sha256 in lineage["evaluation"]["files"].items()},
        **{tag.score_of(suite): f"{found['score']['mean']:.6f}" for suite, found in suites.items()},
    }


def describe(lineage: Mapping[str, Any], model: Path, folder: Path) -> Path:
    """Writes what goes with a model: its card, lineage, bill of materials and, where there is a key, signature."""
    folder.mkdir()
    (folder / CARD).write_text(version_card(lineage), encoding="utf-8")
    (folder / LINEAGE).write_text(as_json(lineage), encoding="utf-8")
    (folder / BILL).write_text(as_json(bill_of_materials()), encoding="utf-8")
    if key := signing_key():
        sign(model, folder / SIGNATURE, key)
    return folder


def complete_run(client: MlflowClient, run: Run, log: Path, summary: Mapping[str, Any]) -> None:
    """Sends to the run what the training could not, or what DVC's cache gave: params, digests of the data, the log."""
    log_params(client, run, flat(summary["params"]))
    log_data(client, run, summary["data"])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    sent = logged_steps(client, run)
    log_rows(client, run, [row for row in rows if row["step"] not in sent])
    log_samples(client, run, rows)
    if KEPT_LOSS not in run.data.metrics:
        log_rows(client, run, [{"step": summary["kept_step"], KEPT_LOSS: summary["held_out_loss_after"]}])


def log_adapter(client: MlflowClient, run: Run, adapter: Path) -> None:
    """Keeps the adapter itself with the run; methods that tune the model whole have none."""
    if (adapter / CONFIG).is_file():
        for name in (*PUBLISHED, "summary.json"):
            client.log_artifact(run.info.run_id, str(adapter / name), ADAPTER)


def log_figures(client: MlflowClient, run: Run, lineage: Mapping[str, Any], cost: Path) -> None:
    """Writes the scores on all suites as metrics, and what they cost, where that was measured."""
    figures = {f"score.{suite}": found["score"]["mean"] for suite, found in lineage["evaluation"]["suites"].items()}
    if cost.is_file():
        told = json.loads(cost.read_text())
        figures |= {f"cost.{name}": value for name, value in told.items() if isinstance(value, (int, float))}
    for name, value in figures.items():
        if run.data.metrics.get(name) != value:
            client.log_metric(run.info.run_id, name, value)


def log_report(client: MlflowClient, run: Run, made: Outputs, about: Path, key: str) -> str:
    """Keeps the report and the description with the run, in a folder of this content's own; returns its place.

    A training that is evaluated again has another version, whose report must not take the place of this one's.
    """
    place = f"versions/{key[:12]}"
    with TemporaryDirectory() as folder:
        shutil.copyfile(made.baseline, Path(folder) / BASE_EXAMPLES)
        for file in (made.reports / METRICS, made.reports / EXAMPLES, Path(folder) / BASE_EXAMPLES, *about.iterdir()):
            client.log_artifact(run.info.run_id, str(file), place)
    return place


def log_model(client: MlflowClient, run: Run, model: Path, about: Path | None, key: str) -> tuple[str, str]:
    """The model's artifacts in MLflow, logged once for this content; returns their id and their URI.

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
    serving, artifacts = serving_of(model), {ARTIFACT: str(model)}
    if about:
        artifacts[ABOUT] = str(about)
    if (model / REFERENCE).is_file() and not is_of_hub(model):
        artifacts[BASE] = str(base_in(model))
    signed = about is not None and (about / SIGNATURE).is_file()
    with mlflow.start_run(run_id=run.info.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(serving.code),
            code_paths=[str(serving.code.parent)],
            artifacts=artifacts,
            signature=serving.signature,
            input_example=serving.example,
            pip_requirements=requirements(signed=signed),
            tags={KEY_TAG: key},
        )
    return info.model_id, info.model_uri


def _ensure_model(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def main() -> None:
    """The stage `register@METHOD`."""
    with process.stage(__doc__, *Outputs._fields, "out", item="method") as stage:
        model, made = stage.params.register_.model, Outputs(*map(stage.path, Outputs._fields))
        with answering(stage.workspace):
            version = register(stage.workspace, stage.item, made, stage.key, stage.params)
            client = connect(stage.workspace)
            for alias in (CHALLENGER, stage.item):
                client.set_registered_model_alias(model, alias, version.version)
        about = {
            "model": model,
            "version": str(version.version),
            "run": version.run_id,
            "key": stage.key,
            "method": stage.item,
        }
        write_whole(stage.path("out"), as_json(about))
        print(f"register {stage.item}: models:/{model}/{version.version}", flush=True)


if __name__ == "__main__":
    main()
