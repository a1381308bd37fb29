"""What a workspace has to show: the reports of its models, read from where dvc.yaml says they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks import graph


class Result(NamedTuple):
    """One model's figures; of the base model there is no version, run or gain."""

    name: str
    metrics: Mapping[str, Any]
    version: str | None
    run: str | None


def read_results(workspace: Path) -> list[Result]:
    """The base model and every method that was evaluated, in the order of params."""
    nodes = graph.load(workspace)
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


def table(results: list[Result]) -> list[dict[str, str]]:
    """The results as rows of text, for a terminal or a page."""
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
