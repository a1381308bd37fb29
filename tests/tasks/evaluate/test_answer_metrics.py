from __future__ import annotations

from random import Random

import numpy as np
import pytest
from sklearn.metrics import (  # type: ignore[import-untyped]
    accuracy_score,
    f1_score,
    precision_recall_fscore_support,
)

from tasks.evaluate.answer_metrics import label_metrics, labels_of, macro_f1
from tasks.evaluate.metrics import metrics_of
from tasks.reports.items import Item, prompt_digest
from tests.helpers.samples import EVALUATE

LABELS = ["complaint", "neutral", "no complaint"]


def drawn(rows: int, seed: int) -> tuple[list[str], list[str]]:
    random = Random(seed)
    targets = [random.choice(LABELS) for _ in range(rows)]
    answers = [random.choice([target, target, *LABELS, "what?"]) for target in targets]
    return targets, answers


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_scikit_learns(seed: int) -> None:
    targets, answers = drawn(60, seed)
    found = label_metrics(targets, answers, EVALUATE.resampling)
    assert found["accuracy"]["mean"] == pytest.approx(accuracy_score(targets, answers))
    expected = f1_score(targets, answers, labels=LABELS, average="macro", zero_division=0)
    assert found["macro_f1"]["mean"] == pytest.approx(expected)
    each = precision_recall_fscore_support(targets, answers, labels=LABELS, zero_division=0)
    for label, precision, recall, f1, rows in zip(LABELS, *each, strict=True):
        about = found["by_label"][label]
        assert (about["precision"], about["recall"], about["f1"]) == pytest.approx((precision, recall, f1))
        assert about["rows"] == rows
        assert about["answers"] == answers.count(label)
    assert found["other_answers"] == answers.count("what?")


def test_figures_worked_out_by_hand() -> None:
    """Of `a` two of three are right and one answer is false: F1 = 4 / (3 + 3); of `b` one of one, with one false."""
    found = label_metrics(["a", "a", "a", "b"], ["a", "a", "b", "b"], EVALUATE.resampling)
    assert found["by_label"]["a"] == pytest.approx(
        {"rows": 3, "answers": 2, "correct": 2, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    )
    assert found["by_label"]["b"]["f1"] == pytest.approx(2 / 3)
    assert found["macro_f1"]["mean"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["accuracy"]["mean"] == 0.75


def test_the_interval_is_that_of_rows_drawn_one_sample_at_a_time() -> None:
    targets, answers = drawn(25, 9)
    found = label_metrics(targets, answers, EVALUATE.resampling)["macro_f1"]
    draws = np.random.default_rng(EVALUATE.seed).integers(0, 25, (EVALUATE.bootstrap_samples, 25))
    scores = []
    for draw in draws:
        some, said = [targets[i] for i in draw], [answers[i] for i in draw]
        there = sorted(set(some) | (set(said) & set(LABELS)))
        scores.append(f1_score(some, said, labels=there, average="macro", zero_division=0))
    low, high = np.quantile(scores, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_a_label_that_a_sample_lacks_is_left_out_of_its_mean() -> None:
    coded = np.array([[[0, 0], [0, 0]], [[0, 1], [1, -1]]], dtype=float)
    assert macro_f1(coded, 3).tolist() == [1.0, 0.0]


def test_targets_that_are_all_alike_all_different_or_many_are_no_labels() -> None:
    assert labels_of(["b", "a", "b", "a"]) == ["a", "b"]
    assert labels_of(["a"] * 9) == []
    assert labels_of(["a", "b", "c"]) == []
    assert labels_of([str(n % 21) for n in range(210)]) == []
    assert len(labels_of([str(n % 20) for n in range(210)])) == 20
    assert label_metrics(["a", "b", "c"], ["a", "b", "c"], EVALUATE.resampling) == {}


def test_a_report_has_labels_where_rows_are_classified() -> None:
    def report(targets: list[str]) -> dict[str, object]:
        rows = [
            Item("held_out", "", str(n), "p", prompt_digest("p"), target, "a", float(target == "a"), -1.0, 1)
            for n, target in enumerate(targets)
        ]
        return metrics_of("m", rows, None, EVALUATE)

    assert "labels" not in report(["a", "b", "c"])
    found = report(["a", "a", "b", "b"])
    assert found["labels"]["accuracy"] == found["exact_match"]  # type: ignore[index]
    assert found["labels"]["by_label"]["b"]["answers"] == 0  # type: ignore[index]
