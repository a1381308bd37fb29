from __future__ import annotations

from random import Random

import pytest

from flows.comparison.disagreements import disagreements, gains
from tasks.evaluate.metrics import metrics_of
from tasks.reports.items import HELD_OUT, Item, Key, by_key, by_suite, compare_items
from tests.helpers.samples import EVALUATE


def answers(*scores: float, suite: str = "s", task: str = "t") -> dict[Key, Item]:
    """Items 0, 1, 2, ... of a task with these scores."""
    return by_key([made(f"sha-{n}", score, suite=suite, task=task) for n, score in enumerate(scores)])


def made(digest: str, score: float, *, suite: str = "s", task: str = "t", target: str = "x") -> Item:
    """An item whose prompt is told by its digest."""
    prompt = digest.replace("sha-", "prompt ")
    return Item(suite, task, digest, prompt, digest, target, f"said {score}", score, -1.0, 1)


def test_items_are_the_same_by_suite_task_prompt_and_target() -> None:
    items = [made("a", 1.0), made("a", 0.5), made("a", 0.0, target="z"), made("a", 0.0, suite="other")]
    found = by_key(items)
    assert list(found) == [
        ("s", "t", "a", "x", 0), ("s", "t", "a", "x", 1), ("s", "t", "a", "z", 0), ("other", "t", "a", "x", 0)
    ]  # fmt: skip
    assert list(found.values()) == items


def test_gains_by_hand() -> None:
    """Differences 1, 0, 1, -1 on four common items; the fifth the base never saw."""
    found = gains(answers(1, 0, 1, 0, 1), answers(0, 0, 0, 1), EVALUATE)
    assert found["s"].interval.mean == pytest.approx(0.25)
    assert found["s"].items == 4
    assert found["s"].says == "unclear"


def test_gains_say_better_or_worse_only_where_the_interval_leaves_out_0() -> None:
    assert gains(answers(1, 1, 1), answers(0, 0, 0), EVALUATE)["s"].says == "better"
    assert gains(answers(0, 0, 0), answers(1, 1, 1), EVALUATE)["s"].says == "worse"
    assert gains(answers(1, 0), answers(1, 0), EVALUATE)["s"].says == "unclear"


def test_gains_do_not_depend_on_the_order_of_rows() -> None:
    model, base = answers(1, 0, 1, 0, 1, 1, 0), answers(0, 0, 0, 1, 1, 0, 0)
    assert gains(model, base, EVALUATE) == gains(dict(reversed(model.items())), base, EVALUATE)


def test_items_on_which_methods_differ_come_first() -> None:
    """Items 0 and 2 part the methods (variance 1/4); item 1 parts both from the base; on item 3 all are wrong."""
    models = {"base": answers(0, 0, 1, 0), "a": answers(1, 1, 1, 0), "b": answers(0, 1, 0, 0)}
    found = disagreements(models, "base")
    assert [each.item.prompt for each in found] == ["prompt 0", "prompt 2", "prompt 1"]  # of equals, by digest
    assert found[-1].answers["a"] == made("sha-1", 1)
    assert list(found[0].answers) == ["base", "a", "b"]


def test_with_one_method_the_base_is_what_it_differs_from() -> None:
    found = disagreements({"base": answers(0, 1, 1), "a": answers(1, 1, 0)}, "base")
    assert [each.item.prompt_sha256 for each in found] == ["sha-0", "sha-2"]


def test_tasks_take_turns() -> None:
    def both(*scores: float) -> dict[Key, Item]:
        return answers(*scores, task="many") | answers(*scores[:1], task="few") | answers(*scores[:1], suite="other")

    found = disagreements({"base": both(0, 0, 0, 0), "a": both(1, 1, 1, 1), "b": both(0, 0, 0, 0)}, "base", most=4)
    assert [(each.item.suite, each.item.task) for each in found] == [
        ("other", "t"), ("s", "few"), ("s", "many"), ("s", "many")
    ]  # fmt: skip


def test_items_that_one_model_never_saw_are_left_out() -> None:
    assert (
        disagreements({"base": answers(0), "a": answers(1, 1), "b": answers(0, 0)}, "base", 9)[0].item.prompt
        == "prompt 0"
    )
    assert disagreements({"a": {}, "b": answers(1)}, "base") == []
    assert disagreements({}, "base") == []


def test_page_report_and_gate_have_one_interval_for_the_same_gain() -> None:
    random = Random(5)
    base = [made(f"sha-{n}", float(random.random() < 0.4), suite=HELD_OUT) for n in range(60)]
    model = [item._replace(score=float(random.random() < 0.7)) for item in reversed(base)]
    page = gains(by_key(model), by_key(base), EVALUATE)[HELD_OUT].interval
    report = metrics_of("m", model, base, EVALUATE)["gain_over_base"]
    gate = compare_items(by_suite(model)[HELD_OUT], by_suite(base)[HELD_OUT], "score", EVALUATE.resampling)
    assert page == (report["mean"], report["low"], report["high"]) == (gate.gain, gate.low, gate.high)
