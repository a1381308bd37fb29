"""The steps of a tokenizer.json around its vocabulary, tried before a library runs them.

A normalizer replaces text by longer text, step after step; a regular expression may take longer than there is time. So
these steps are tried on short texts by the worker with its limits, with no vocabulary, before the tokenizer is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from tasks.core.artifacts import read_object
from tasks.core.errors import BadInput, BadModel
from tasks.core.limited_process import FAILURES, WORKER, Failure

MOST_GROWTH = 64
"""No text becomes so many times longer; Unicode itself makes 18 characters of one."""

MOST_REPLACED_WITH = 1000
"""Characters that something may be replaced with, whether a text tried here has it or not."""

_STEPS = ("normalizer", "pre_tokenizer", "decoder")
_TRIED_CHARACTERS = 1024
_TRIED = ("a", " ", "1", "!", "\n", "\t", "é", "汉", "aA", "a ", "a1", "a.", "'s", " a1!\n", "The quick brown fox. ")
"""What the short texts repeat."""


def check_steps(folder: Path) -> None:
    """Refuse a tokenizer.json whose steps take too long, or make too much of a short text.

    Raises:
        BadModel: they do.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        content = read_object(path)
    except BadInput:
        return  # what does not load is told by whoever loads it
    steps = {name: content.get(name) for name in _STEPS}
    replaced = list(_replacements(steps))
    long = [text[:40] for _, text in replaced if len(text) > MOST_REPLACED_WITH]
    if long:
        raise BadModel(
            "its tokenizer replaces text with too much",
            where=str(path),
            examples=[f"{text!r}..." for text in long],
            expected=f"at most {MOST_REPLACED_WITH:,} characters",
        )
    patterns = [str(each) for each in _patterns(steps)]
    if not patterns and prod(max(1.0, len(to) / max(len(of), 1)) for of, to in replaced) <= MOST_GROWTH:
        return
    _try(path, steps, [*patterns, *(text for pair in replaced for text in pair)])


def _try(path: Path, steps: Mapping[str, Any], own: list[str]) -> None:
    """Run the steps on short texts: some of usual characters, and one of all that the steps look for and write."""
    empty: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
    }
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    texts = [(each * _TRIED_CHARACTERS)[:_TRIED_CHARACTERS] for each in _TRIED]
    mixed = " ".join(own)
    texts += [mixed[start : start + _TRIED_CHARACTERS] for start in range(0, len(mixed), _TRIED_CHARACTERS)]
    asked = json.dumps({**empty, **steps, "model": model})
    found = WORKER.map("tasks.tokenization.tokenizer_worker:step_prober", asked, texts)
    for text, each in zip(texts, found, strict=True):
        if isinstance(each, Failure):
            raise BadModel(
                f"its tokenizer {FAILURES[each.kind]}",
                where=str(path),
                got=f"{each.text} with {len(text):,} characters such as {text[:20]!r}",
                fix="take the tokenizer of a copy that you trust",
            )
        if int(each.text) > MOST_GROWTH * len(text):
            raise BadModel(
                "its tokenizer makes too much of a short text",
                where=str(path),
                got=f"{int(each.text):,} characters out of {len(text):,} such as {text[:20]!r}",
                expected=f"at most {MOST_GROWTH} times as many",
                fix="take the tokenizer of a copy that you trust",
            )


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects in the steps."""
    if isinstance(value, Mapping):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _parts(inner)


def _replacements(steps: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is replaced with what; what a pattern finds, or what is put before all, may be nothing."""
    for part in _parts(steps):
        pattern = part.get("pattern")
        if part.get("type") == "Replace":
            text = pattern.get("String") if isinstance(pattern, Mapping) else ""
            yield str(text or ""), str(part.get("content") or "")
        elif part.get("type") == "Prepend":
            yield "", str(part.get("prepend") or "")


def _patterns(steps: Mapping[str, Any]) -> Iterator[Any]:
    for part in _parts(steps):
        if "Regex" in part:
            yield part["Regex"]
