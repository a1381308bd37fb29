"""The figures of a report, from its items."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tasks.core.errors import BadData
from tasks.core.layout import METRICS
from tasks.evaluate.answer_metrics import label_metrics
from tasks.evaluate.forgetting import TextLoss
from tasks.evaluate.model_under_test import Effort, ModelUnderTest
from tasks.evaluate.params import Evaluate
from tasks.models.device import device
from tasks.reports.items import HELD_OUT, Item, Summary, by_key, compare_items, mean_loss, suite_metrics
from tasks.reports.statistics import Interval


def metrics_of(
    model: str,
    items: Sequence[Item],
    base: Sequence[Item] | None,
    params: Evaluate,
    suite_summaries: Mapping[tuple[str, str], Summary] = MappingProxyType({}),
) -> dict[str, Any]:
    """Compute the metrics that are reported of a model.

    Args:
        model: its name.
        items: of the held-out rows, and of further suites.
        base: the base model's of the same held-out rows, for the paired gain.
        params: of the intervals.
        suite_summaries: of the further suites' tasks.

    Raises:
        BadData: the base model answered other questions.
    """
    summaries = {(HELD_OUT, item.task): Summary("exact_match", {}) for item in items if item.suite == HELD_OUT}
    suites = suite_metrics(items, {**summaries, **suite_summaries}, params.resampling)
    answers = [item for item in items if item.suite == HELD_OUT]
    metrics: dict[str, Any] = {
        "model": model,
        "rows": len(answers),
        "exact_match": suites[HELD_OUT]["score"],
        "loss": mean_loss(answers),
        "families": {
            family: {"rows": each["rows"], "exact_match": each["score"]["mean"]}
            for family, each in suites[HELD_OUT]["tasks"].items()
        },
        "suites": suites,
    }
    if labels := label_metrics([a.target for a in answers], [a.prediction for a in answers], params.resampling):
        metrics["labels"] = labels
    if base is not None:
        before = _paired(answers, base)
        gain = compare_items(by_key(answers), by_key(before), "score", params.resampling)
        metrics["gain_over_base"] = Interval(gain.gain, gain.low, gain.high)._asdict()
        metrics["base"] = {
            "exact_match": sum(old.score for old in before) / len(before),
            "loss": mean_loss(before),
        }
    return metrics


def _paired(answers: Sequence[Item], base: Sequence[Item]) -> list[Item]:
    """Return the base model's items of the same questions, in the same order.

    Raises:
        BadData: the base answered others.
    """
    known = {(item.id, *item.same): item for item in base}
    if others := [item.id for item in answers if (item.id, *item.same) not in known]:
        raise BadData(
            f"{len(others)} of {len(answers)} held-out rows are not those that the base model answered",
            examples=others,
            fix="run the stage `baseline` anew",
        )
    return [known[item.id, *item.same] for item in answers]


def written_by(examinee: ModelUnderTest, answers: Sequence[Item]) -> tuple[list[str], list[int]]:
    """Return the texts of answers, and how many tokens each has."""
    texts = [item.prediction for item in answers]
    return texts, [len(ids) for ids in examinee.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def cost_of(effort: Effort) -> dict[str, Any]:
    """Return what an evaluation cost, which depends on the machine and so is no part of its report."""
    speed = effort.tokens / effort.seconds
    return {**effort._asdict(), "tokens_per_s": speed, "device": str(device())}


def forgetting(own: TextLoss, base: Path | None) -> dict[str, Any]:
    """Compare the loss on the general text with the base model's, whose report stands beside its items.

    Raises:
        BadData: the base's report lacks it, or is of another text.
    """
    if base is None:
        return {**own._asdict(), "base_loss": own.loss}
    before = json.loads((base.parent / METRICS).read_text()).get("forgetting", {})
    if before.get("tokens") != own.tokens or not math.isfinite(before.get("loss", math.nan)):
        raise BadData(
            "the base model has no loss on this general text",
            where=str(base.parent / METRICS),
            got=f"{before.get('tokens')} tokens",
            expected=f"{own.tokens} tokens",
            fix="run the stage `baseline` anew",
        )
    return {**own._asdict(), "base_loss": before["loss"]}


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """Return a report's figures in one line, for the console."""
    exact, labels = metrics["exact_match"], metrics.get("labels")
    said = f"exact match {exact['mean']:.3f} [{exact['low']:.3f}, {exact['high']:.3f}], loss {metrics['loss']:.3f}"
    if labels:
        said += f", macro-F1 {labels['macro_f1']['mean']:.3f}"
    for suite, each in metrics["suites"].items():
        if suite != HELD_OUT:
            score = each["score"]
            said += f"; {suite} {each['metric']} {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
    return said
