"""What answers are like, whether they are right or not: how long, empty, refused, repeating themselves."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.checks.facts import refusing
from tasks.checks.words import normal_form, runs, words_of

REPEATED_WORDS = 4
"""The n of seq-rep-n."""


def answer_statistics(predictions: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """Figures of a model's answers, each a mean over answers.

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
    """Of each text the share of runs of four words that stood in it before: seq-rep-4.

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
