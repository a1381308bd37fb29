"""Registers a model in MLflow with its evidence and its lineage, once for the same content.

Reads:  data/models/METHOD/, data/reports/METHOD/ (metrics, examples), data/adapters/METHOD/ (adapter, log, summary).
Writes: a version of `register.model` with the alias `challenger` and an alias named like the method, and in its run the
        adapter, also where the model has it merged;
        data/reports/METHOD/registered.json (model, version, run, key).
Params: register
Fails:  MLflow does not answer (75, retried).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import process
from tasks.adapter_files import CONFIG, PUBLISHED
from tasks.architecture import ENCODER_DECODER, architecture_in
from tasks.evaluate import METRICS
from tasks.generation_params import Generation
from tasks.items import EXAMPLES
from tasks.outputs import MANIFEST, as_json, digest, read_manifest, write_whole
from tasks.registry import ADAPTER, CHALLENGER, find_version
from tasks.templates import load_tokenizer, template_digest
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
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec

SERVED_WITH = (
    "accelerate",
    "jinja2",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "psutil",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
)
"""What a registered model needs to run."""


def evidence_tags(
    metrics: Mapping[str, Any], summary: Mapping[str, Any], models: Path, key: str, commit: str
) -> dict[str, str]:
    """What a version says of itself: its identity, its scores and where it comes from."""
    base = read_manifest(models)
    return {
        KEY_TAG: key,
        "temper.method": str(metrics["model"]),
        "temper.train_key": str(summary["key"]),
        "temper.git_commit": commit,
        "temper.model_manifest_sha256": digest(models / MANIFEST),
        "temper.weights_sha256": ",".join(
            f["sha256"] for name, f in base["files"].items() if name.endswith(".safetensors")
        ),
        "temper.exact_match": f"{metrics['exact_match']['mean']:.6f}",
        "temper.loss": f"{metrics['loss']:.6f}",
        "temper.base_exact_match": f"{metrics['base']['exact_match']:.6f}",
        "temper.base_loss": f"{metrics['base']['loss']:.6f}",
        "temper.held_out_rows": str(metrics["rows"]),
        "temper.template_sha256": template_digest(load_tokenizer(models)),
    }


def git_commit(workspace: Path) -> str:
    """The commit that the workspace is at, with a `+` when files differ from it; empty outside git."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=workspace, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=workspace, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+" if changed.strip() else commit


def chat_signature() -> ModelSignature:
    """The request and the reply of llm/v1/chat, as far as a small model has them, and how a reply is generated."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    text, number = DataType.string, DataType.long
    message = Object([Property("role", text), Property("content", text)])
    choice = Object([Property("index", number), Property("message", message), Property("finish_reason", text)])
    usage = Object([Property(name, number) for name in ("prompt_tokens", "completion_tokens", "total_tokens")])
    request = Schema([ColSpec(Array(message), "messages"), *_options()])
    reply = Schema(
        [ColSpec(text, "object"), ColSpec(text, "model"), ColSpec(Array(choice), "choices"), ColSpec(usage, "usage")]
    )
    return ModelSignature(inputs=request, outputs=reply)


def text_signature() -> ModelSignature:
    """An input and what is written for it, of an encoder-decoder model."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Object, Property, Schema

    text, number = DataType.string, DataType.long
    usage = Object([Property(name, number) for name in ("prompt_tokens", "completion_tokens")])
    request = Schema([ColSpec(text, "input"), *_options()])
    reply = Schema([ColSpec(text, "output"), ColSpec(text, "finish_reason"), ColSpec(usage, "usage")])
    return ModelSignature(inputs=request, outputs=reply)


def _options() -> list[ColSpec]:
    """The columns of how a reply is generated.

    Their values the model itself checks: MLflow would refuse a temperature of 2, being no 2.0, and nulls.
    """
    from mlflow.types.schema import AnyType, ColSpec

    anything = AnyType()  # type: ignore[no-untyped-call]
    return [ColSpec(anything, name, required=False) for name in ("max_tokens", *Generation.model_fields)]


class Serving(NamedTuple):
    """How models of a kind are served: the file that MLflow runs, its signature, and a request as an example."""

    code: Path
    signature: ModelSignature
    example: dict[str, Any]


def serving_of(models: Path) -> Serving:
    """How the model of a folder is served."""
    from tasks import served, served_text

    asked = "What is 17 plus 25?"
    if architecture_in(models) is ENCODER_DECODER:
        return Serving(Path(served_text.__file__), text_signature(), {"input": asked})
    return Serving(Path(served.__file__), chat_signature(), {"messages": [{"role": "user", "content": asked}]})


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


def log_model(client: MlflowClient, run: Run, models: Path, key: str) -> tuple[str, str]:
    """The model's artifacts in MLflow, logged once for this content; returns their id and their URI."""
    from importlib.metadata import version

    import mlflow
    from mlflow.entities import LoggedModelStatus

    from tasks.served import ARTIFACT

    for found in client.search_logged_models([run.info.experiment_id], f"tags.`{KEY_TAG}` = '{key}'"):
        if found.status == LoggedModelStatus.READY:
            return found.model_id, found.model_uri
    serving = serving_of(models)
    with mlflow.start_run(run_id=run.info.run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(serving.code),
            code_paths=[str(serving.code.parent)],
            artifacts={ARTIFACT: str(models)},
            signature=serving.signature,
            input_example=serving.example,
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in SERVED_WITH],
            tags={KEY_TAG: key},
        )
    return info.model_id, info.model_uri


def register(workspace: Path, model: str, models: Path, reports: Path, adapter: Path, key: str) -> ModelVersion:
    """The version of this content: found, or made with everything that belongs to it.

    Every step looks first whether an earlier attempt did it, and the version itself is made last, with its tags, in one
    request: a kill anywhere leaves either no version or a whole one.
    """
    client = connect(workspace)
    if found := find_version(client, model, key):
        return found
    summary = json.loads((adapter / "summary.json").read_text())
    metrics = json.loads((reports / METRICS).read_text())
    method = metrics["model"]
    run = run_of(client, workspace, summary["key"], f"train {method}", {"temper.method": method})
    complete_run(client, run, adapter / "log.jsonl", summary)
    figures = {"exact_match": metrics["exact_match"]["mean"], "evaluation_loss": metrics["loss"]}
    if "labels" in metrics:
        figures["macro_f1"] = metrics["labels"]["macro_f1"]["mean"]
    for name, value in figures.items():
        client.log_metric(run.info.run_id, name, value)
    for file in (METRICS, EXAMPLES):
        client.log_artifact(run.info.run_id, str(reports / file), "report")
    log_adapter(client, run, adapter)
    model_id, uri = log_model(client, run, models, key)
    client.set_terminated(run.info.run_id)
    _ensure_model(client, model)
    tags = evidence_tags(metrics, summary, models, key, git_commit(workspace))
    return client.create_model_version(model, uri, run.info.run_id, tags=tags, model_id=model_id)


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
    with process.stage(__doc__, "model", "reports", "adapter", "out", item="method") as stage:
        model = stage.params.register_.model
        with answering(stage.workspace):
            version = register(
                stage.workspace, model, stage.path("model"), stage.path("reports"), stage.path("adapter"), stage.key
            )
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
