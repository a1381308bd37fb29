"""Former names of the keys of params.yaml, and the migration of an old file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tasks.core.params_file import METHODS, SHARED

RENAMED: Mapping[str, str] = {
    "validate.leak_words": "contamination_ngram",
    "validate.checks.unnormalised": "unicode_normalization",
    "validate.checks.telephones": "phone_numbers",
    "validate.checks.keys": "secrets",
    "validate.checks.leaks": "contamination",
    "train.*.batch_rows": "batch_size",
    "train.*.micro_batch_rows": "micro_batch_size",
    "merge.probe_rows": "probe_examples",
    "evaluate.batch_rows": "batch_size",
    "promote.max_leaked": "max_contamination",
    "base.growth.learnt": "merges",
    "train.*.evaluation.patience": "early_stopping_patience",
    "train_defaults.evaluation.patience": "early_stopping_patience",
}
"""Of each old place the new name of its last key; `*` is any method."""

REPLACED: Mapping[str, Mapping[str, str]] = {
    "validate.duplicates.exact": {"merge": "drop"},
    "validate.duplicates.near": {"merge": "drop"},
}
"""Of each place the old values, and what they are called now."""


class Outdated(NamedTuple):
    """A key, or a value, that has another name now."""

    place: tuple[str, ...]
    key: str
    value: str | None

    def __str__(self) -> str:
        """Say what becomes of it."""
        old = ".".join(self.place)
        return f"{old}: {self.value}" if self.value else f"{old} -> {'.'.join((*self.place[:-1], self.key))}"


def outdated(content: Mapping[str, Any]) -> list[Outdated]:
    """Return what has another name now in a file's content, in the order of the tables above."""
    found = [Outdated(place, new, None) for old, new in RENAMED.items() for place in _places(old, content)]
    for where, values in REPLACED.items():
        for place in _places(where, content):
            value = _parent(place, content)[place[-1]]
            if isinstance(value, str) and value in values:
                found.append(Outdated(place, place[-1], f"{value} -> {values[value]}"))
    return found


def migrate(content: Any) -> list[Outdated]:
    """Give everything its present name, in a ruamel round-trip mapping; order and comments stay.

    Returns:
        What was changed, and is in the old words.
    """
    found = outdated(content)
    for each in found:
        node = _parent(each.place, content)
        if each.value:
            node[each.key] = each.value.rpartition(" ")[2]
        else:
            _rename(node, each.place[-1], each.key)
    if METHODS in content and SHARED not in content:
        content.insert(list(content).index(METHODS), SHARED, {})
    return found


def _rename(node: Any, old: str, new: str) -> None:
    position, value, comment = list(node).index(old), node[old], node.ca.items.get(old)
    del node[old]
    node.insert(position, new, value)
    if comment:
        node.ca.items[new] = comment


def _places(pattern: str, content: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place that a pattern means and where something stands."""
    key, _, rest = pattern.partition(".")
    if isinstance(content, Mapping):
        for name in list(content) if key == "*" else [key] if key in content else []:
            yield from _places(rest, content[name], (*above, name)) if rest else [(*above, name)]


def _parent(place: tuple[str, ...], content: Any) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content
