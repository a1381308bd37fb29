"""Reports on the registry: the champion alias's moves, two versions beside each other, and a version's lineage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.registry.evidence import evidence
from tasks.core import pipeline
from tasks.core.errors import BadParams
from tasks.orchestration.params import load_params
from tasks.registry import names as tag
from tasks.registry.alias_log import champions, moves
from tasks.registry.client import answering, connect, connect_to_read, fetch_artifact
from tasks.registry.local_reader import RegistryReader
from tasks.registry.versions import version_at, version_of, versions
from tasks.reports.items import compare_items
from tasks.reports.statistics import Difference

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def history(workspace: Path) -> dict[str, Any]:
    """Read the ledger of the workspace's model, and its versions.

    Returns:
        `model`; `champion`, or None; `moves`, the fields of each entry, oldest first; `versions`, of each its number,
        method, scores by suite, aliases, and whether the gate let it through (None: it was not judged).
    """
    client, model = connect_to_read(workspace), load_params(workspace / pipeline.PARAMS).register_.model
    with answering(workspace):
        ledger, known = moves(client, model), versions(client, model)
        stack = champions(ledger)
        aliases = _aliases(client, model) if known else {}
        return {
            "model": model,
            "champion": stack[-1] if stack else None,
            "moves": [move._asdict() for move in ledger],
            "versions": [_told(version, aliases) for version in known],
        }


def _aliases(client: RegistryReader, model: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, version in client.get_registered_model(model).aliases.items():
        found.setdefault(str(version), []).append(alias)
    return found


def _told(version: ModelVersion, aliases: dict[str, list[str]]) -> dict[str, Any]:
    verdict = version.tags.get(tag.VERDICT)
    prefix = tag.score_of("")
    return {
        "version": str(version.version),
        "method": version.tags.get(tag.METHOD, ""),
        "scores": {n.removeprefix(prefix): float(v) for n, v in version.tags.items() if n.startswith(prefix)},
        "aliases": sorted(aliases.get(str(version.version), [])),
        "passed": json.loads(verdict)["passed"] if verdict else None,
    }


def compare(workspace: Path, first: str, second: str) -> dict[str, Any]:
    """Two versions on the items that both answered, suite by suite.

    Args:
        workspace: whose model it is.
        first: the number of a version.
        second: of another.

    Returns:
        `model`; `first` and `second` with version and method; `suites`, of each `score` and, where its items have
        log-probabilities, `loss`: items in common, both figures, how much better the second is with its interval, the
        noise floor, and the gain that counts (0 within the noise).

    Raises:
        BadParams: there is no such version, or its report cannot be read.
    """
    params = load_params(workspace / pipeline.PARAMS)
    client, model = connect_to_read(workspace), params.register_.model
    with answering(workspace):
        one, two = (evidence(client, version_of(client, model, n)) for n in (first, second))
    suites: dict[str, dict[str, Any]] = {}
    for suite in sorted(one.suites.keys() | two.suites.keys()):
        old, new = one.suites.get(suite, {}), two.suites.get(suite, {})
        for metric in ("score", "loss"):
            found = compare_items(new, old, metric, params.promote.resampling)
            if metric == "score" or not math.isnan(found.gain):
                suites.setdefault(suite, {})[metric] = _numbers(found)
    named = {"first": one, "second": two}
    told = {name: {"version": each.version, "method": each.method} for name, each in named.items()}
    return {"model": model, **told, "suites": suites}


def _numbers(found: Difference) -> dict[str, Any]:
    told = {"items": found.items, "first": found.old, "second": found.new, "gain": found.gain, "low": found.low}
    told |= {"high": found.high, "noise": found.noise, "counted": found.counted}
    return {name: None if math.isnan(value) else value for name, value in told.items()}


def lineage(workspace: Path, address: str) -> dict[str, Any]:
    """Trace a version's lineage, all the way: commit, keys, rows, params, base, adapter, evaluation, verdict.

    Args:
        workspace: whose registry it is.
        address: models:/NAME/VERSION, models:/NAME@ALIAS, or the number of a version of the workspace's model.

    Raises:
        BadParams: there is no such version, or it was registered without its lineage.
    """
    client, model = connect(workspace), load_params(workspace / pipeline.PARAMS).register_.model
    with answering(workspace):
        version = version_of(client, model, address) if address.isdecimal() else version_at(client, address)
        place = version.tags.get(tag.LINEAGE_TAG)
        where = f"models:/{version.name}/{version.version}"
        if not place:
            raise BadParams("was registered without its lineage", where=where, fix="register it again")
        with TemporaryDirectory() as folder:
            try:
                path = fetch_artifact(client, str(version.run_id), place, Path(folder))
            except OSError as error:
                raise BadParams(
                    "its lineage cannot be read", where=where, got=str(error), fix="bring it back"
                ) from error
            found: dict[str, Any] = json.loads(path.read_text())
        ledger = [
            move._asdict() for move in moves(client, version.name) if str(version.version) in (move.to, move.before)
        ]
    verdict = version.tags.get(tag.VERDICT)
    return {
        "version": str(version.version),
        "run": version.run_id,
        "registered_at_ms": version.creation_timestamp,
        **found,
        "signed": version.tags.get(tag.SIGNED) == "true",
        "verdict": json.loads(verdict) if verdict else None,
        "moves": ledger,
    }
