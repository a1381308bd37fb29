"""The state of a workspace as one object, and what it has to show: champion, figures, stages, reports."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core import pipeline
from tasks.orchestration.dvc_session import changed_stages
from tasks.orchestration.params import load_params
from tasks.orchestration.run_journal import last_seconds
from tasks.registry.alias_log import champion_of
from tasks.registry.client import answering, connect_to_read
from tasks.registry.names import METHOD
from tasks.registry.versions import versions


def overview(workspace: Path) -> dict[str, Any]:
    """Collect what `temper status` shows.

    Returns:
        `model`; `champion` with its version and method, or None; `base` with its exact match, or None; `methods`, by
        name, with exact match, loss and version; `stages`, by name, with their state (current, changed or new) and
        the seconds that they last took.
    """
    model = load_params(workspace / pipeline.PARAMS).register_.model
    results = {result.name: result for result in read_results(workspace)}
    base = results.pop("base", None)
    return {
        "model": model,
        "champion": _champion(workspace, model),
        "base": {"exact_match": base.metrics["exact_match"]["mean"], "loss": base.metrics["loss"]} if base else None,
        "methods": {
            name: {
                "exact_match": result.metrics["exact_match"]["mean"],
                "interval": [result.metrics["exact_match"]["low"], result.metrics["exact_match"]["high"]],
                "loss": result.metrics["loss"],
                "version": result.version,
            }
            for name, result in results.items()
        },
        "stages": _stages(workspace),
    }


def lock_changed(workspace: Path) -> bool:
    """Return whether dvc.lock differs from what git has of it; False outside a git repository."""
    asked = ["git", "status", "--porcelain", "--", pipeline.LOCK]
    try:
        return bool(subprocess.run(asked, cwd=workspace, capture_output=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return False


def _champion(workspace: Path, model: str) -> dict[str, str] | None:
    client = connect_to_read(workspace)
    with answering(workspace):
        version = champion_of(client, model)
        if version is None:
            return None
        known = {str(each.version): each.tags.get(METHOD, "") for each in versions(client, model)}
        return {"version": version, "method": known.get(version, "its version is gone")}


def _stages(workspace: Path) -> dict[str, dict[str, Any]]:
    changed, seconds, done = changed_stages(workspace), last_seconds(workspace), pipeline.recorded_keys(workspace)

    def state(stage: str) -> str:
        return "new" if stage not in done else "changed" if stage in changed else "current"

    return {
        stage: {"state": state(stage), "seconds": round(seconds.get(stage, 0.0), 1)}
        for stage in pipeline.load(workspace)
    }


class Result(NamedTuple):
    """One model's figures; of the base model there is no version, run or gain."""

    name: str
    metrics: Mapping[str, Any]
    version: str | None
    run: str | None


def read_results(workspace: Path) -> list[Result]:
    """Read the results of the base model and every method that was evaluated, in the order of params."""
    nodes = pipeline.load(workspace)
    results = []
    for stage, node in nodes.items():
        name, _, item = stage.partition("@")
        if name in ("baseline", "evaluate"):
            metrics = _json(workspace, next(out for out in node.outs if out.endswith(".json")))
            registered = _json(workspace, nodes[f"register@{item}"].outs[0]) if item else None
            if metrics:
                version, run = (registered["version"], registered["run"]) if registered else (None, None)
                results.append(Result(item or "base", metrics, version, run))
    return results


def results_table(results: list[Result]) -> list[dict[str, str]]:
    """Format the results as rows of text, for a terminal or a page."""
    return [
        {
            "model": result.name,
            "exact match": _interval(result.metrics["exact_match"]),
            "gain over base": _interval(result.metrics["gain_over_base"], sign=True)
            if "gain_over_base" in result.metrics
            else "",
            "loss": f"{result.metrics['loss']:.3f}",
            "version": result.version or "",
        }
        for result in results
    ]


def _interval(value: Mapping[str, float], *, sign: bool = False) -> str:
    style = "+.3f" if sign else ".3f"
    return f"{value['mean']:{style}} [{value['low']:{style}}, {value['high']:{style}}]"


def _json(workspace: Path, path: str) -> dict[str, Any] | None:
    file = workspace / path
    return json.loads(file.read_text()) if file.is_file() else None
