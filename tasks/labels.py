"""Classification by generated label: what answers are worth where the targets are few and the same again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.evaluate_params import Evaluate
from tasks.intervals import bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_LABELS = 20
"""With more different targets the rows are no classification."""

LEAST_ROWS = 2
"""So many rows of each label, on average, with fewer they are none either."""

OTHER = -1
"""The number of answers that are no label."""


def labels_of(targets: Sequence[str]) -> list[str]:
    """The labels that rows are classified by; empty where their targets are none."""
    labels = sorted(set(targets))
    few = 2 <= len(labels) <= MOST_LABELS and len(targets) >= LEAST_ROWS * len(labels)
    return labels if few else []


def label_metrics(targets: Sequence[str], answers: Sequence[str], params: Evaluate) -> dict[str, Any]:
    """Accuracy and macro-F1 with their intervals, and what became of each label.

    Answers that are no label are wrong, and count for no label.

    Args:
        targets: the label of each row.
        answers: what the model wrote.
        params: of the intervals.

    Returns:
        `accuracy`, `macro_f1`, `other_answers` (how many were no label) and `by_label`: rows, answers, correct ones,
        precision, recall and F1. Nothing for rows that are no classification.
    """
    labels = labels_of(targets)
    if not labels:
        return {}
    numbers = {label: number for number, label in enumerate(labels)}
    coded = [(numbers[t], numbers.get(a, OTHER)) for t, a in zip(targets, answers, strict=True)]
    rows, given = Counter(targets), Counter(answers)
    correct = Counter(t for t, a in zip(targets, answers, strict=True) if t == a)
    return {
        "accuracy": bootstrap([t == a for t, a in coded], params)._asdict(),
        "macro_f1": bootstrap(coded, params, partial(macro_f1, labels=len(labels)))._asdict(),
        "other_answers": sum(a == OTHER for _, a in coded),
        "by_label": {
            label: {
                "rows": rows[label],
                "answers": given[label],
                "correct": correct[label],
                "precision": correct[label] / given[label] if given[label] else 0.0,
                "recall": correct[label] / rows[label],
                "f1": 2 * correct[label] / (rows[label] + given[label]),
            }
            for label in labels
        },
    }


def macro_f1(coded: NDArray[Any], labels: int) -> NDArray[Any]:
    """The mean over labels of F1 = 2 TP / (2 TP + FP + FN), of each sample.

    Args:
        coded: the number of each row's label and of its answer, (samples, rows, 2).
        labels: how many there are. One that occurs on neither side of a sample is left out of its mean.

    Returns:
        (samples,), from 0 to 1.
    """
    import numpy as np

    targets, answers = coded[..., 0], coded[..., 1]
    scores = np.full((len(coded), labels), np.nan)
    for label in range(labels):
        either = (targets == label).sum(axis=1) + (answers == label).sum(axis=1)
        both = ((targets == label) & (answers == label)).sum(axis=1)
        np.divide(2 * both, either, out=scores[:, label], where=either > 0)
    found: NDArray[Any] = np.nanmean(scores, axis=1)
    return found
