"""The comparison of all models as one HTML page: scores, gains, examples, cost. Logged to MLflow, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.format import duration, size
from flows.comparison import charts
from flows.comparison.collect import BASE_NAME, ComparedModel, ComparedModels, gather
from flows.comparison.disagreements import MOST_SHOWN, Gain, disagreements, gains
from tasks.core.artifacts import atomic_write, digest
from tasks.html.shell import LIGHT_SERIES, html_page
from tasks.registry.client import run_of
from tasks.reports.statistics import Interval

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COMPARISON_PAGE = Path(".temper", "pages", "comparison.html")
COMPARISON_TEMPLATE = Path(__file__).with_name("comparison.html.jinja")
HELD_OUT = "held_out"
"""The suite that every report has; it comes first."""
_FIRST, _LAST = 240, 480
"""Of a longer text so many characters are shown from its beginning and its end: there stands the question."""
_ALL_TASKS = 16
"""A suite with more tasks shows them when it is asked to."""


def write(workspace: Path) -> Path:
    """Write the page of what a workspace has now; return its path."""
    path = workspace / COMPARISON_PAGE
    atomic_write(path, comparison_page(gather(workspace)))
    return path


def publish_comparison(client: MlflowClient, workspace: Path, written: Path) -> Run:
    """Log a page to MLflow, unless the very same one is logged already."""
    run = run_of(client, workspace, digest(written)[:16], "comparison", {"temper.kind": "comparison"})
    if run.info.status != "FINISHED":
        client.log_artifact(run.info.run_id, str(written))
        client.set_terminated(run.info.run_id, "FINISHED")
    return run


def comparison_page(found: ComparedModels) -> str:
    """Render the comparison as one self-contained HTML page; the same input always gives the same bytes."""
    return html_page(COMPARISON_TEMPLATE, comparison_values(found))


def comparison_values(found: ComparedModels) -> dict[str, Any]:
    """Collect what the template of the comparison is filled with."""
    series = {name: number for number, name in enumerate(found.methods)}
    answered = {model.name: model.answers for model in found.models}
    suites = sorted({name for model in found.models for name in model.metrics["suites"]}, key=_held_out_first)
    return {
        "found": found,
        "series": series,
        "series_colours": len(LIGHT_SERIES),
        "legend": charts.legend(list(series.items())),
        "has_base": BASE_NAME in answered,
        "suites": suites,
        "best": [_best(found.models, suite) for suite in suites],
        "plots": [_suite_plots(found.models, suite, series) for suite in suites],
        "scores": _score_table(found, suites),
        "tasks": [_task_table(found.models, suite) for suite in suites],
        "examples": disagreements(answered, BASE_NAME),
        "most": MOST_SHOWN,
        "costs": [_cost(name, found) for name in (BASE_NAME, *series)],
        "answers": _parts(found.models, "answers"),
        "forgetting": _parts(found.models, "forgetting"),
        "percent": "{:.1%}".format,
        "shown": shown,
        "mark": _right_or_wrong,
    }


def shown(text: str) -> str:
    """Return a text as it is, or shortened in the middle."""
    if len(text) <= _FIRST + _LAST:
        return text
    return f"{text[:_FIRST]}\n[… {len(text) - _FIRST - _LAST:,} characters …]\n{text[-_LAST:]}"


# --- scores -----------------------------------------------------------------------------------------------------------


def _held_out_first(suite: str) -> tuple[bool, str]:
    return suite != HELD_OUT, suite


def _interval(scored: Mapping[str, Any]) -> Interval:
    return Interval(**scored["score"])


def _best(models: Sequence[ComparedModel], suite: str) -> dict[str, Any]:
    """Find the highest score in a suite, and all models that have it."""
    means = {m.name: _interval(m.metrics["suites"][suite]).mean for m in models if suite in m.metrics["suites"]}
    highest = max(means.values())
    return {"suite": suite, "score": f"{highest:.3f}", "models": [name for name in means if means[name] == highest]}


def _suite_plots(models: Sequence[ComparedModel], suite: str, series: Mapping[str, int]) -> dict[str, Any]:
    """Build the two plots of a suite: every method over all its rows, and, where there are several tasks, over each."""
    by_model = {m.name: m.metrics["suites"][suite] for m in models if suite in m.metrics["suites"]}
    about = next(iter(by_model.values()))
    base = by_model.pop(BASE_NAME, None)
    reference = _interval(base) if base else None
    whole = [
        charts.ChartRow(name, [charts.Mark(name, series[name], _interval(scored))], reference)
        for name, scored in by_model.items()
    ]
    tasks = sorted({task for scored in by_model.values() for task in scored["tasks"]})
    parts = [
        charts.ChartRow(
            task,
            [
                charts.Mark(name, series[name], _interval(scored["tasks"][task]))
                for name, scored in by_model.items()
                if task in scored["tasks"]
            ],
            _interval(base["tasks"][task]) if base and task in base["tasks"] else None,
        )
        for task in tasks
    ]
    span = charts.span_of([*whole, *parts])
    return {
        "suite": suite,
        "metric": about["metric"],
        "rows": about["rows"],
        "skipped": sorted({part for scored in by_model.values() for part in scored.get("skipped", [])}),
        "whole": charts.whiskers(whole, span, f"Scores in {suite}") if whole else None,
        "parts": charts.whiskers(parts, span, f"Scores in {suite} by task") if len(parts) > 1 else None,
        "tasks": len(parts),
        "open": len(parts) <= _ALL_TASKS,
    }


def _score_table(found: ComparedModels, suites: Sequence[str]) -> list[dict[str, Any]]:
    """Build a row for every model: in each suite its score, and its paired gain over the base."""
    base = next((model.answers for model in found.models if model.name == BASE_NAME), None)
    rows = []
    for model in found.models:
        over = gains(model.answers, base, found.params) if base is not None and model.name != BASE_NAME else {}
        cells = [_cell(model.metrics["suites"].get(suite), over.get(suite)) for suite in suites]
        rows.append({"name": model.name, "cells": cells, "loss": f"{model.metrics['loss']:.3f}"})
    return rows


def _cell(scored: Mapping[str, Any] | None, gain: Gain | None) -> dict[str, Any]:
    if scored is None:
        return {"score": "", "interval": "not evaluated"}
    score = _interval(scored)
    cell = {"score": f"{score.mean:.3f}", "interval": f"[{score.low:.3f}, {score.high:.3f}]"}
    if gain:
        mean, low, high = gain.interval
        cell["gain"] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        cell["says"] = gain.says
        if gain.items != scored["rows"]:
            cell["gain"] += f" on {gain.items:,} common items"
    return cell


def _task_table(models: Sequence[ComparedModel], suite: str) -> dict[str, Any]:
    """Build the table of the figures of each task of a suite, by model."""
    by_model = {m.name: m.metrics["suites"].get(suite, {}).get("tasks", {}) for m in models}
    rows = []
    for task in sorted({task for tasks in by_model.values() for task in tasks}):
        about = next(tasks[task] for tasks in by_model.values() if task in tasks)
        cells = [_task_cell(tasks.get(task)) for tasks in by_model.values()]
        rows.append({"task": task, "metric": about["metric"], "rows": about["rows"], "cells": cells})
    return {"suite": suite, "models": list(by_model), "rows": rows}


def _task_cell(scored: Mapping[str, Any] | None) -> dict[str, str]:
    if scored is None:
        return {"score": "", "more": ""}
    mean, low, high = _interval(scored)
    more = [f"[{low:.3f}, {high:.3f}]"] + [f"{name} {value:.3f}" for name, value in scored["figures"].items()]
    return {"score": f"{mean:.3f}", "more": "; ".join(more)}


# --- examples, cost -------------------------------------------------------------------------------------------


def _right_or_wrong(score: float) -> dict[str, str]:
    if score == 1.0:
        return {"css": "good", "text": "✓ right"}
    if score == 0.0:
        return {"css": "bad", "text": "✗ wrong"}
    return {"css": "soft", "text": f"score {score:.3f}"}


def _cost(name: str, found: ComparedModels) -> dict[str, str]:
    """Return what a method cost; empty where it is not known."""
    training = found.trainings.get(name)
    cost = next((model.cost for model in found.models if model.name == name), None)
    row = {"name": name}
    if training:
        tokens, seconds = training.summary.get("tokens"), training.seconds
        row["trained"] = f"{training.summary['trainable_parameters']:,}"
        row["weights"] = size(training.weights_bytes)
        row["steps"] = f"{training.summary['steps']:,}"
        row["tokens"] = f"{tokens:,}" if tokens else ""
        if seconds:
            row["time"] = duration(seconds)
            row["speed"] = f"{tokens / seconds:,.0f}" if tokens else ""
    if cost:
        row["evaluation"] = f"{duration(cost['seconds'])}, {cost['tokens_per_s']:,.0f} tokens/s on {cost['device']}"
    return row


def _parts(models: Sequence[ComparedModel], part: str) -> list[tuple[str, Mapping[str, float]]]:
    """Return one section of the metrics of every model that has it."""
    return [(model.name, model.metrics[part]) for model in models if part in model.metrics]
