"""Inputs of the comparison of models, read from where the stages left them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core import pipeline
from tasks.core.layout import STATE, cost_file
from tasks.evaluate.params import Evaluate
from tasks.orchestration.params import load_params
from tasks.orchestration.run_journal import seconds_by_key
from tasks.reports.items import Items, by_key, read_items

BASE_NAME = "base"


class ComparedTraining(NamedTuple):
    """Results of a training: its summary, the bytes of its weights; seconds where it ran here."""

    summary: Mapping[str, Any]
    weights_bytes: int
    seconds: float | None


class ComparedModel(NamedTuple):
    """Report and other outputs of a model; `cost` is what evaluating it took."""

    name: str
    metrics: Mapping[str, Any]
    answers: Items
    cost: Mapping[str, Any] | None


class ComparedModels(NamedTuple):
    """All that is compared.

    Attributes:
        models: the base, if it was evaluated, then the methods in the order of params.
        missing: of what has no report, or one of an earlier form, the name and what to do.
        methods: all of params, in their order.
        trainings: by method, also of those without a report.
        params: of the intervals.
    """

    models: Sequence[ComparedModel]
    missing: Mapping[str, str]
    methods: Sequence[str]
    trainings: Mapping[str, ComparedTraining]
    params: Evaluate


def gather(workspace: Path) -> ComparedModels:
    """Read the reports, adapters and times of a workspace, as far as they are there."""
    params, seconds, nodes = (
        load_params(workspace / pipeline.PARAMS),
        seconds_by_key(workspace),
        pipeline.load(workspace),
    )
    models, missing, trainings = [], {}, {}
    for name in (BASE_NAME, *params.train):
        stage = "baseline" if name == BASE_NAME else f"evaluate@{name}"
        model = _model(workspace, name, nodes[stage].outs)
        if isinstance(model, str):
            missing[name] = f"{model}: temper run brings `{stage}` up to date"
        else:
            models.append(model)
    for name in params.train:
        adapter = workspace / nodes[f"train@{name}"].outs[0]
        if (adapter / "summary.json").is_file():
            trainings[name] = _training(adapter, seconds)
    return ComparedModels(models, missing, list(params.train), trainings, params.evaluate)


def _model(workspace: Path, name: str, outs: Sequence[str]) -> ComparedModel | str:
    """Read a model's report, or return why there is none."""
    figures, examples = (workspace / next(o for o in outs if o.endswith(end)) for end in (".json", ".parquet"))
    if not (figures.is_file() and examples.is_file()):
        return "was not evaluated"
    metrics = json.loads(figures.read_text())
    if "suites" not in metrics:
        return "was evaluated by an earlier temper, which knew no suites"
    cost = cost_file(workspace / STATE, name)
    answers = by_key(read_items(examples))
    return ComparedModel(name, metrics, answers, json.loads(cost.read_text()) if cost.is_file() else None)


def _training(adapter: Path, seconds: Mapping[str, float]) -> ComparedTraining:
    """Read a training from its adapter's folder; `seconds` are by content key."""
    summary = json.loads((adapter / "summary.json").read_text())
    weights = sum(file.stat().st_size for file in adapter.rglob("*.safetensors"))
    return ComparedTraining(summary, weights, seconds.get(summary["key"]))
