"""Questions of a benchmark that stand in rows to learn from: whole, or by 13 words in a row (arXiv:2005.14165, C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tasks.text.words import Words, hashes_of, normal_form, runs, words_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

COMMON = 10
"""A run of words that stands in more questions than this, or in more rows of the data that the questions were held out
of, is boilerplate and counts for nothing."""

FEWEST_WORDS = 4
"""Shorter questions, such as "go on", stand anywhere by chance and are not looked for."""

_TABLE_BITS = 22


class Hits(NamedTuple):
    """Hits of questions in texts, (hits,) each: which text, which question, which run of words (0: the whole)."""

    text: NDArray[np.int64]
    question: NDArray[np.int64]
    run: NDArray[np.uint64]


def without_common(hits: Hits) -> Hits:
    """Return the hits without those by a run of words that was found in more than `COMMON` texts."""
    import numpy as np

    runs_found, texts = np.unique(_distinct(hits.run, hits.text)[0], return_counts=True)
    common = runs_found[(texts > COMMON) & (runs_found > 0)]
    kept = ~np.isin(hits.run, common)
    return Hits(hits.text[kept], hits.question[kept], hits.run[kept])


def _distinct(hashes: NDArray[np.uint64], numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return every pair of a hash and a number once, in order."""
    import numpy as np

    order = np.lexsort((numbers, hashes))
    hashes, numbers = hashes[order], numbers[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (numbers[1:] != numbers[:-1])
    return hashes[first], numbers[first]


class Index:
    """The questions of one benchmark, to look for in any number of texts."""

    def __init__(self, texts: pa.Array, run_words: int | None) -> None:
        """Index questions.

        Args:
            texts: the questions.
            run_words: the length of a run; questions with fewer words are only found whole. None for no runs.
        """
        import numpy as np

        questions, words, whole = len(texts), words_of(normal_form(texts)), hashes_of(texts)
        filled = np.flatnonzero(np.bincount(words.text, minlength=questions) >= FEWEST_WORDS)
        self._whole = _Table(whole[filled], filled)
        found = runs(words, run_words or len(words.hash) + 1)
        hashes, numbers = _distinct(found.hash, found.text)
        distinct, counts = np.unique(hashes, return_counts=True)
        kept = np.isin(hashes, distinct[counts <= COMMON])
        self._runs = _Table(hashes[kept], numbers[kept])

    def search(self, whole: Words, found: Words) -> Hits:
        """Find which questions stand in texts, and in which.

        Args:
            whole: the hash of each whole text, as `hashes_of` makes it, and the number of the text.
            found: the texts' runs of words, of the length that the index was made with.
        """
        import numpy as np

        at, exact = self._whole.look_up(whole.hash)
        inside, overlapping = self._runs.look_up(found.hash)
        return Hits(
            np.concatenate([whole.text[at], found.text[inside]]),
            np.concatenate([exact, overlapping]),
            np.concatenate([np.zeros(len(at), np.uint64), found.hash[inside]]),
        )


class _Table:
    """Hashes with a number each, looked up in two steps: a table of bits passes over nearly all that is not there."""

    def __init__(self, hashes: NDArray[np.uint64], numbers: NDArray[np.int64]) -> None:
        import numpy as np

        order = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers = hashes[order], numbers[order]
        self._bits = np.zeros(1 << _TABLE_BITS, bool)
        self._bits[hashes >> np.uint64(64 - _TABLE_BITS)] = True

    def look_up(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each pair of the place of a hash that is here and a number that it has."""
        import numpy as np

        likely = np.flatnonzero(self._bits[hashes >> np.uint64(64 - _TABLE_BITS)])
        first = np.searchsorted(self._hashes, hashes[likely], side="left")
        last = np.searchsorted(self._hashes, hashes[likely], side="right")
        counts = last - first
        at = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(likely, counts), self._numbers[at]
