"""Metrics of answers whether right or not (length, refusals, repetition), and of generated labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.reports.statistics import Resampling, bootstrap
from tasks.text.refusals import refusing
from tasks.text.words import normal_form, runs, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


REPEATED_WORDS = 4
"""The n of seq-rep-n."""


def answer_statistics(predictions: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """Compute figures of a model's answers, each a mean over answers.

    Args:
        predictions: the answers' texts, at least one.
        tokens: how many tokens each has.

    Returns:
        `characters` and `tokens` of an answer; `empty`, the share with nothing but white space; `refusals`, the share
        that begins by declining, by the rule of the check `refusals`; `repetition`, as `repetition` below has it.
    """
    import numpy as np
    import pyarrow as pa

    texts = pa.array(predictions, pa.large_string())
    return {
        "characters": float(np.mean([len(text) for text in predictions])),
        "tokens": float(np.mean(tokens)),
        "empty": float(np.mean([not text.strip() for text in predictions])),
        "refusals": float(refusing(texts).mean()),
        "repetition": float(np.mean(repetition(predictions))),
    }


def repetition(texts: Sequence[str]) -> list[float]:
    """Compute seq-rep-4 of each text: the share of runs of four words that stood in it before.

    That is 1 - (different runs / runs), from 0 to 1 (Welleck et al. 2020, arXiv:1908.04319, equation 10). Words are
    those of the leak check: without case and punctuation, and each Chinese or Japanese character is one; so texts
    without spaces are measured like others. A text of fewer than four words repeats nothing.
    """
    import numpy as np
    import pyarrow as pa

    found = runs(words_of(normal_form(pa.array(texts, pa.large_string()))), REPEATED_WORDS)
    different = np.unique(np.stack([found.text.astype(np.uint64), found.hash]), axis=1)[0].astype(np.int64)
    runs_of, different_of = (np.bincount(text, minlength=len(texts)) for text in (found.text, different))
    shares: list[float] = ((runs_of - different_of) / np.maximum(runs_of, 1)).tolist()
    return shares


MOST_LABELS = 20
"""With more different targets the rows are no classification."""

LEAST_ROWS = 2
"""So many rows of each label, on average, with fewer they are none either."""

OTHER = -1
"""The number of answers that are no label."""


def labels_of(targets: Sequence[str]) -> list[str]:
    """Return the labels that rows are classified by; empty where their targets are none."""
    labels = sorted(set(targets))
    few = 2 <= len(labels) <= MOST_LABELS and len(targets) >= LEAST_ROWS * len(labels)
    return labels if few else []


def label_metrics(targets: Sequence[str], answers: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """Accuracy and macro-F1 with their intervals, and what became of each label.

    Answers that are no label are wrong, and count for no label.

    Args:
        targets: the label of each row.
        answers: what the model wrote.
        resampling: of the intervals.

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
        "accuracy": bootstrap([t == a for t, a in coded], resampling)._asdict(),
        "macro_f1": bootstrap(coded, resampling, partial(macro_f1, labels=len(labels)))._asdict(),
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
    """Compute the mean over labels of F1 = 2 TP / (2 TP + FP + FN), of each sample.

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
