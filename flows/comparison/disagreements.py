"""Models compared on the same items: gains with their intervals, and the items on which models differ most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tasks.evaluate.params import Evaluate
from tasks.reports.items import Item, Items, Key, compare_items
from tasks.reports.statistics import Interval

MOST_SHOWN = 12


class Gain(NamedTuple):
    """Gain of a model's score over another's on the items of a suite that both answered."""

    interval: Interval
    items: int

    @property
    def says(self) -> str:
        """`better`, `worse`, or, where the interval holds 0, `unclear`."""
        return "better" if self.interval.low > 0 else "worse" if self.interval.high < 0 else "unclear"


class Disagreement(NamedTuple):
    """Answers of each model to one item, by the model's name."""

    answers: Mapping[str, Item]

    @property
    def item(self) -> Item:
        """The first model's, of which suite, task, prompt and target are those of all."""
        return next(iter(self.answers.values()))


def gains(model: Items, base: Items, params: Evaluate) -> dict[str, Gain]:
    """Compute the paired gain over the base for each suite, in the order of the suites' names; as the gate does."""
    suites = sorted({model[key].suite for key in model.keys() & base.keys()})
    found = {}
    for suite in suites:
        new, old = ({key: item for key, item in items.items() if item.suite == suite} for items in (model, base))
        gain = compare_items(new, old, "score", params.resampling)
        found[suite] = Gain(Interval(gain.gain, gain.low, gain.high), gain.items)
    return found


def disagreements(models: Mapping[str, Items], base: str, most: int = MOST_SHOWN) -> list[Disagreement]:
    """List items that every model answered and that they score differently on, those that differ most first.

    The measure is the variance of the methods' scores, then that of all models' with the base; the prompt's digest
    decides between equals, as no item shall be favoured for its place. Tasks take turns, so that none fills the list.

    Args:
        models: the answers of each, in the order that they are shown in.
        base: which of them is the base.
        most: the most items returned.
    """
    common = set.intersection(*(set(answers) for answers in models.values())) if models else set()
    methods = [answers for name, answers in models.items() if name != base]

    ranked = sorted((-_spread(key, methods), -_spread(key, list(models.values())), key[2], key) for key in common)
    chosen = [key for *_, key in _in_turn([entry for entry in ranked if math.fsum(entry[:2]) < 0])]
    return [Disagreement({name: answers[key] for name, answers in models.items()}) for key in chosen[:most]]


def _spread(key: Key, among: Sequence[Items]) -> float:
    """Compute the variance of some models' scores; `fsum`, as it gives equal scores the same in any order."""
    scores = [answers[key].score for answers in among]
    mean = math.fsum(scores) / max(len(scores), 1)
    return math.fsum((score - mean) ** 2 for score in scores) / max(len(scores), 1)


def _in_turn(ranked: Sequence[tuple[float, float, str, Key]]) -> Iterator[tuple[float, float, str, Key]]:
    """Yield the best of each task, then the second of each, and so on; within a round by rank."""
    rounds: Counter[tuple[str, str]] = Counter()
    placed = []
    for entry in ranked:
        task = entry[-1][:2]
        placed.append((rounds[task], *entry))
        rounds[task] += 1
    yield from (entry[1:] for entry in sorted(placed))
