"""Rows that say the same: in the same words, or nearly (MinHash with locality-sensitive hashing, Broder 1997)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.text.words import Words, runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

SHINGLE_WORDS = 3
"""Two rows are compared by their runs of so many words."""


class Duplicate(NamedTuple):
    """A row that repeats another: their numbers, and the share of runs of words that both have (Jaccard)."""

    row: int
    kept: int
    similarity: float


def exact_duplicates(hashes: NDArray[np.uint64], order: Sequence[int]) -> list[Duplicate]:
    """Find rows with the same content.

    Args:
        hashes: of all text of each row; 0 for a row without text, which is nobody's duplicate.
        order: the rows, the one to keep of any two first.

    Returns:
        Every row but the first of each set of equals.
    """
    first: dict[int, int] = {}
    found = []
    values = hashes.tolist()
    for row in order:
        kept = first.setdefault(values[row], row)
        if kept != row and values[row]:
            found.append(Duplicate(row, kept, 1.0))
    return found


class NearIndex:
    """Finds the rows that may be near duplicates of any other, from sketches of a few hundred bytes a row."""

    def __init__(self, similarity: float, permutations: int, bands: int) -> None:
        """Create an empty index.

        Args:
            similarity: the least Jaccard index of two duplicates, over 0 and at most 1.
            permutations: hashes in a sketch, a multiple of `bands`.
            bands: groups of hashes; two rows are candidates when one group agrees, which happens with probability
                1 - (1 - s^(permutations / bands))^bands at a similarity of s.
        """
        from rensa import RMinHashLSH

        self.similarity, self.permutations, self.bands = similarity, permutations, bands
        self._index = RMinHashLSH(similarity, permutations, bands)
        self._sketches: list[Any] = []
        self._rows = 0

    def add(self, words: Words, rows: int) -> None:
        """Add the next rows; `words.text` counts them from 0."""
        shingles = runs(words, SHINGLE_WORDS)
        sketches = self._sketch(shingles.hash, _offsets(shingles, rows))
        self._index.insert_matrix(sketches, self._rows)
        self._sketches.append(sketches)
        self._rows += rows

    def suspects(self) -> NDArray[np.int64]:
        """Return the rows that share a band with another row."""
        import numpy as np

        flags = [self._index.query_duplicate_flags_matrix(sketches) for sketches in self._sketches]
        return np.flatnonzero(np.concatenate([np.asarray(each, bool) for each in flags])) if flags else np.empty(0, int)

    def duplicates(self, suspects: Sequence[int], words: Words) -> list[Duplicate]:
        """Find the suspects that are near duplicates of one that is kept.

        Args:
            suspects: rows, the one to keep of any two first.
            words: of those rows; `words.text` is the place in `suspects`.

        Returns:
            Each with the row it repeats most closely, by the runs of words themselves.
        """
        import numpy as np

        shingles = runs(words, SHINGLE_WORDS)
        offsets = _offsets(shingles, len(suspects)).astype(np.int64)
        sets = [np.unique(shingles.hash[start:stop]) for start, stop in pairwise(offsets)]
        buckets: dict[tuple[int, bytes], list[int]] = {}
        found = []
        for place, keys in enumerate(self._band_keys(sets)):
            if not len(sets[place]):
                continue
            rivals = dict.fromkeys(kept for key in keys for kept in buckets.get(key, ()))
            best = max(((_jaccard(sets[place], sets[kept]), -kept) for kept in rivals), default=(0.0, 0))
            if best[0] >= self.similarity:
                found.append(Duplicate(suspects[place], suspects[-best[1]], best[0]))
            else:
                for key in keys:
                    buckets.setdefault(key, []).append(place)
        return found

    def _sketch(self, hashes: NDArray[np.uint64], offsets: NDArray[np.uint64]) -> Any:
        from rensa import RMinHash

        return RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, self.permutations, 0)

    def _band_keys(self, sets: list[NDArray[np.uint64]]) -> Iterator[list[tuple[int, bytes]]]:
        import numpy as np

        width = self.permutations // self.bands
        for start in range(0, len(sets), _SKETCHED_AT_ONCE):
            some = sets[start : start + _SKETCHED_AT_ONCE]
            offsets = np.cumsum([0, *(len(each) for each in some)]).astype(np.uint64)
            for row in np.asarray(self._sketch(np.concatenate(some), offsets).to_rows(), np.uint32):
                yield [(band, row[band * width : (band + 1) * width].tobytes()) for band in range(self.bands)]


_SKETCHED_AT_ONCE = 4096


def _offsets(words: Words, rows: int) -> NDArray[np.uint64]:
    import numpy as np

    return np.searchsorted(words.text, np.arange(rows + 1)).astype(np.uint64)


def _jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    import numpy as np

    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
