"""The state of a workspace as one object: champion, figures, stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.results import read_results
from tasks import graph
from tasks.ledger import champion_of
from tasks.params_reading import load
from tasks.registry import versions
from tasks.runner import changed_stages, last_seconds
from tasks.tracking import connect


def overview(workspace: Path) -> dict[str, Any]:
    """What `temper status` tells.

    Returns:
        `model`; `champion` with its version and method, or None; `base` with its exact match, or None; `methods`, by
        name, with exact match, loss and version; `stages`, by name, with their state (current, changed or new) and
        the seconds that they last took.
    """
    model = load(workspace / graph.PARAMS).register_.model
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


def _champion(workspace: Path, model: str) -> dict[str, str] | None:
    client = connect(workspace)
    version = champion_of(client, model)
    if version is None:
        return None
    method = next(
        (v.tags.get("temper.method", "") for v in versions(client, model) if str(v.version) == version),
        "its version is gone",
    )
    return {"version": version, "method": method}


def _stages(workspace: Path) -> dict[str, dict[str, Any]]:
    changed, seconds, done = changed_stages(workspace), last_seconds(workspace), graph.recorded_keys(workspace)

    def state(stage: str) -> str:
        return "new" if stage not in done else "changed" if stage in changed else "current"

    return {
        stage: {"state": state(stage), "seconds": round(seconds.get(stage, 0.0), 1)} for stage in graph.load(workspace)
    }
