"""Evaluated items: one row for each question of a suite, and the figures over them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, get_type_hints

from tasks.core.errors import BadData, BadModel
from tasks.core.parquet import read_rows, write_rows
from tasks.reports.statistics import Difference, Resampling, bootstrap, paired_difference

if TYPE_CHECKING:
    import pyarrow as pa


class Item(NamedTuple):
    """One question and what a model made of it.

    Attributes:
        suite: a name of params, or `held_out`.
        task: a part of the suite; of `held_out` the row's family.
        id: of the question, unique in its task.
        prompt: what the model was given.
        prompt_sha256: of that text in UTF-8.
        target: what is right.
        prediction: what the model wrote or chose.
        score: by the task's main metric, higher is better; of exact match and accuracy 0 or 1.
        logp: the log-probability of the target, nats, the sum over its tokens; NaN where the metric has none.
        tokens: how many tokens that are.
    """

    suite: str
    task: str
    id: str
    prompt: str
    prompt_sha256: str
    target: str
    prediction: str
    score: float
    logp: float
    tokens: int

    @property
    def same(self) -> tuple[str, str, str, str]:
        """Return the key that agrees when two models answered the same question."""
        return self.suite, self.task, self.prompt_sha256, self.target


class Summary(NamedTuple):
    """Summary of a task's items: `metric` names the score; `figures` are further numbers of the task."""

    metric: str
    figures: Mapping[str, float]

    def counting(self, name: str, count: int) -> Summary:
        """Return the summary with one more figure, if it is not zero."""
        return self._replace(figures={**self.figures, name: float(count)}) if count else self


def prompt_digest(text: str) -> str:
    """Compute the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def items_schema() -> pa.Schema:
    """Return the columns of examples.parquet: the fields of `Item`."""
    import pyarrow as pa

    types = {str: pa.string(), float: pa.float64(), int: pa.int32()}
    return pa.schema([(name, types[hint]) for name, hint in get_type_hints(Item).items()])


def read_items(path: Path) -> list[Item]:
    """Read the items of a report.

    Raises:
        BadData: the file is no report of this version.
    """
    rows = read_rows(path)
    if rows and rows[0].keys() != set(Item._fields):
        raise BadData(
            "is no report of items",
            where=str(path),
            got=", ".join(rows[0]),
            expected=", ".join(Item._fields),
            fix="evaluate the model anew",
        )
    return [Item(**row) for row in rows]


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write a report's items; the same items give the same bytes."""
    write_rows(path, [item._asdict() for item in items], items_schema())


def check_scores(items: Sequence[Item]) -> None:
    """Refuse scores that are not numbers, as a model with broken weights gives them.

    Raises:
        BadModel: an item's score is not finite, or its log-probability is infinite, or NaN over some tokens.
    """
    wrong = [
        f"{item.suite}/{item.task}/{item.id}: score {item.score}, log-probability {item.logp}"
        for item in items
        if not math.isfinite(item.score) or math.isinf(item.logp) or (item.tokens and math.isnan(item.logp))
    ]
    if wrong:
        raise BadModel(
            f"{len(wrong)} of {len(items)} items have scores that are not finite; nothing is reported",
            examples=wrong,
            fix="look for NaN in the weights of the model or its adapter",
        )


def mean_loss(items: Sequence[Item]) -> float:
    """Compute the loss per token over all items that have one, in nats."""
    scored = [item for item in items if item.tokens]
    return -sum(item.logp for item in scored) / sum(item.tokens for item in scored)


def suite_metrics(
    items: Sequence[Item], summaries: Mapping[tuple[str, str], Summary], resampling: Resampling
) -> dict[str, Any]:
    """Compute what is reported of each suite and its tasks, with bootstrap intervals over rows.

    Args:
        items: of one or more suites.
        summaries: by suite and task; all tasks must have one.
        resampling: of the intervals.

    Returns:
        By suite: `metric` (`score` where its tasks have different ones), `rows`, `score` and `tasks`, of each of which
        the same and its `figures`.
    """
    suites: dict[str, dict[str, list[Item]]] = {}
    for item in items:
        suites.setdefault(item.suite, {}).setdefault(item.task, []).append(item)
    found = {}
    for suite, tasks in suites.items():
        names = {summaries[suite, task].metric for task in tasks}
        found[suite] = {
            "metric": names.pop() if len(names) == 1 else "score",
            **_scored([item for rows in tasks.values() for item in rows], resampling),
            "tasks": {
                task: {
                    "metric": summaries[suite, task].metric,
                    **_scored(rows, resampling),
                    "figures": dict(summaries[suite, task].figures),
                }
                for task, rows in tasks.items()
            },
        }
    return found


def _scored(rows: Sequence[Item], resampling: Resampling) -> dict[str, Any]:
    return {"rows": len(rows), "score": bootstrap([item.score for item in rows], resampling)._asdict()}


HELD_OUT = "held_out"
"""The suite of the rows that were held out of training; a report always has it."""

Key: TypeAlias = tuple[str, str, str, str, int]
"""Which item it is: suite, task, the SHA-256 of the prompt, target; and a count, from 0, of those alike in all that."""
Items: TypeAlias = Mapping[Key, Item]
"""A model's results by what makes items of two models the same."""


def by_key(items: Iterable[Item]) -> dict[Key, Item]:
    """Key a model's items by what makes them the same as another's; a question asked twice is two items."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: dict[Key, Item] = {}
    for item in items:
        found[*item.same, seen[item.same]] = item
        seen[item.same] += 1
    return found


def by_suite(items: Iterable[Item]) -> Mapping[str, Items]:
    """Group the results of a report by suite."""
    found: dict[str, dict[Key, Item]] = {}
    for key, item in by_key(items).items():
        found.setdefault(item.suite, {})[key] = item
    return found


def compare_items(new: Items, old: Items, metric: str, resampling: Resampling) -> Difference:
    """Compare two models on the items that both answered.

    Args:
        new: the results of one.
        old: the results of the other.
        metric: `score`, the mean over items, or `loss`, nats per token over all tokens.
        resampling: how items are drawn.
    """
    import numpy as np

    keys = sorted(new.keys() & old.keys())
    values, weights = (np.array(each, float).reshape(2, -1) for each in _numbers(keys, new, old, metric))
    return paired_difference(values, weights, resampling, higher_is_better=metric == "score")


def _numbers(keys: Sequence[Key], new: Items, old: Items, metric: str) -> tuple[list[list[float]], list[list[float]]]:
    """Return what is added up of each model's items, and what the sum is divided by."""
    both = [[each[key] for key in keys] for each in (new, old)]
    if metric == "score":
        return [[item.score for item in items] for items in both], [[1.0] * len(keys)] * 2
    return [[item.logp for item in items] for items in both], [[float(item.tokens) for item in items] for items in both]
