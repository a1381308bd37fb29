"""Register a model in MLflow with its evidence and its lineage, once for the same content.

Reads:  data/models/METHOD/, data/reports/METHOD/ and the base model's examples, data/adapters/METHOD/, data/base/,
        data/rendered/ (its training rows are looked through for evaluation items).
Writes: a version of `register.model` with the alias `challenger` and an alias named like the method; in it the model,
        its card, lineage, bill of materials and, with a key, signature; in its run the report and the adapter, also
        where the model has it merged; data/reports/METHOD/registered.json (model, version, run, key).
Params: register, ingest.sources
Fails:  MLflow does not answer (75, retried); a signing key that cannot be used (65, never retried).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tasks.core.artifacts import as_json, atomic_write, digest, read_manifest
from tasks.core.layout import EXAMPLES, METRICS, STATE, cost_file
from tasks.core.stage import run_stage
from tasks.publish.model_card import version_card
from tasks.register.lineage import StagePaths, lineage_of
from tasks.register.mlflow_log import (
    DESCRIPTION_CHARACTERS,
    complete_run,
    describe,
    ensure_model,
    log_adapter,
    log_figures,
    log_model,
    log_report,
    tags_of,
)
from tasks.register.params import LicensedSource, Register
from tasks.registry import names as tag
from tasks.registry.client import answering, connect, run_of
from tasks.registry.names import ABOUT, CHALLENGER
from tasks.registry.signing import SIGNATURE
from tasks.registry.versions import find_version, remove_doubles

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def register(
    workspace: Path, method: str, made: StagePaths, key: str, model: str, sources: Mapping[str, Mapping[str, str]]
) -> ModelVersion:
    """Find the version of this content, or register it with everything that belongs to it.

    Every step looks first whether an earlier attempt did it, and the version itself is made last, with its tags, in one
    request: a kill anywhere leaves either no version or a whole one. Of two who make it at once the one with the higher
    number takes its own away again: numbers are given one after the other, so it sees the other.
    """
    client = connect(workspace)
    if found := find_version(client, model, key):
        remove_doubles(client, model, key)
        return found
    lineage = lineage_of(workspace, method, made, key, model, sources)
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
    ensure_model(client, model)
    client.create_model_version(
        model,
        uri,
        run.info.run_id,
        tags=tags_of(lineage, place, signed=signed),
        description=version_card(lineage)[:DESCRIPTION_CHARACTERS],
        model_id=model_id,
    )
    return remove_doubles(client, model, key)


def version_key(method: str, made: StagePaths) -> str:
    """Compute the identity of a version: its method, and the bytes of the model and of its report.

    So a changed comment, which makes DVC run stages again to the same bytes, makes no second version of a model.

    Returns:
        64 hex digits.
    """
    files = read_manifest(made.model)["files"]
    lines = [f"{name} {file['sha256']}" for name, file in sorted(files.items())]
    report = (made.reports / EXAMPLES, made.reports / METRICS, made.baseline)
    lines += [method, *(f"{path.name} {digest(path)}" for path in report)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main() -> None:
    """Run the stage `register@METHOD`."""
    with run_stage(__doc__, *StagePaths._fields, "out", item="method") as stage:
        model, made = stage.section("register", Register).model, StagePaths(*map(stage.path, StagePaths._fields))
        sources = {
            name: each.model_dump() for name, each in stage.section("ingest.sources", dict[str, LicensedSource]).items()
        }
        with answering(stage.workspace):
            key = version_key(stage.item, made)
            version = register(stage.workspace, stage.item, made, key, model, sources)
            client = connect(stage.workspace)
            for alias in (CHALLENGER, stage.item):
                client.set_registered_model_alias(model, alias, version.version)
        about = {
            "model": model,
            "version": str(version.version),
            "run": version.run_id,
            "key": key,
            "method": stage.item,
        }
        atomic_write(stage.path("out"), as_json(about))
        print(f"register {stage.item}: models:/{model}/{version.version}", flush=True)
