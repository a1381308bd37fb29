from __future__ import annotations

from random import Random

import pytest

from tasks.evaluate.answer_metrics import answer_statistics, repetition


def test_figures_by_hand() -> None:
    """Characters (2 + 0 + 3 + 14) / 4, tokens (1 + 0 + 2 + 5) / 4; two answers of four are empty, none declines."""
    found = answer_statistics(["19", "", " \n ", "the red wall !"], [1, 0, 2, 5])
    assert found == {"characters": 19 / 4, "tokens": 2.0, "empty": 0.5, "refusals": 0.0, "repetition": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I have no opinion.",
        "I'm sorry, but I can't help.",
        "很抱歉，我无法回答。",
        "作为一个语言模型",
    ],
)
def test_refusals_in_english_and_chinese(text: str) -> None:
    assert answer_statistics([text, "Paris", "我无法相信它这么好"], [9, 1, 9])["refusals"] == pytest.approx(1 / 3)


def test_what_declines_later_on_is_no_refusal() -> None:
    assert answer_statistics(["x" * 200 + " as an AI model"], [9])["refusals"] == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d", 0.0),  # one run
        ("a b c", 0.0),  # none
        ("a b c d a b c d", 1 / 5),  # five runs, of which abcd stands twice
        ("a a a a a a a a", 4 / 5),  # five runs, all the same
        ("A, a; a. a! a", 1 / 2),  # without case and punctuation: two runs, both the same
        ("好好好好好", 1 / 2),  # each Chinese character is a word
        ("我们很好我们很好", 1 / 5),
    ],
)
def test_repetition_by_hand(text: str, share: float) -> None:
    assert repetition([text]) == pytest.approx([share])


def test_repetition_against_sets_in_plain_python() -> None:
    random = Random(3)
    texts = [" ".join(random.choices("abc", k=random.randrange(40))) for _ in range(200)]

    def by_sets(text: str) -> float:
        words = text.split()
        runs = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    assert repetition(texts) == pytest.approx([by_sets(text) for text in texts])
