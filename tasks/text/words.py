"""Texts as words, many at once: what duplicates and contamination are told by.

A word is a run of letters and digits without case, or one character of Chinese or Japanese; everything else stands
between words. Words become 64-bit hashes in a few passes over the bytes, without a Python object for any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.records import normalized_text

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15
"""An odd number, so that it has an inverse modulo 2^64."""

_BLOCK_BYTES = 1 << 22


class Words(NamedTuple):
    """Words in order: `hash` (words,) uint64, `text` (words,) int64, the number of the text each stands in."""

    hash: NDArray[np.uint64]
    text: NDArray[np.int64]


def normal_form(texts: pa.Array) -> pa.Array:
    """Normalise texts to words with spaces between them: without case, width, punctuation; Chinese characters apart.

    For long runs of words, which may do without symbols; what is equal is decided by `equality_form`.
    """
    return _form(texts, str.isalnum, lambda those: _words_of_any_script(those, r"[^\p{L}\p{M}\p{N}]+"))


def near_form(texts: pa.Array) -> pa.Array:
    """Normalise texts likewise, but with all symbols that are no punctuation of sentences: 8 - 2 is not near 8 + 2."""
    between = r"[\s\p{Z}.,;:?'\"\x{2018}-\x{201f}\x{2026}\x{3001}\x{3002}\x{300a}-\x{300f}]+"
    return _form(
        texts,
        lambda character: not (character.isspace() or character in ".,;:?'\""),
        lambda those: _words_of_any_script(those, between),
    )


def equality_form(texts: pa.Array) -> pa.Array:
    """Normalise texts as `tasks.core.records.normalized_text` does, but for how much white space stands between."""

    def wide(those: pa.Array) -> pa.Array:
        import pyarrow as pa

        return pa.array([normalized_text(text or "") for text in those.to_pylist()], pa.large_string())

    return _form(texts, lambda character: not character.isspace(), wide)


def _words_of_any_script(texts: pa.Array, between: str) -> pa.Array:
    import pyarrow.compute as pc

    wide = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    wide = pc.replace_substring_regex(wide, pattern=between, replacement=" ")
    return pc.replace_substring_regex(wide, pattern=r"([\p{Han}\p{Hiragana}\p{Katakana}])", replacement=r" \1 ")


def _form(texts: pa.Array, keeps: Callable[[str], bool], wide: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Make lower case of ASCII texts, with a space for each character that is not kept; `wide` forms the others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = texts.cast(pa.large_string())
    plain = pc.string_is_ascii(texts)
    if pc.all(plain).as_py() is not False:
        return _plain_form(texts, keeps)
    formed = wide(texts.take(pc.indices_nonzero(pc.invert(plain))))
    return pc.replace_with_mask(_plain_form(pc.if_else(plain, texts, ""), keeps), pc.invert(plain), formed)


def _plain_form(texts: pa.Array, keeps: Callable[[str], bool]) -> pa.Array:
    """Normalise ASCII texts to words with spaces between them: a table says what becomes of each byte."""
    import numpy as np
    import pyarrow as pa

    table = np.full(256, ord(" "), np.uint8)
    for byte in range(128):
        if keeps(chr(byte)):
            table[byte] = ord(chr(byte).lower())
    content = _compact(texts)
    _, offsets, data = content.buffers()
    changed = table[np.frombuffer(data, np.uint8)] if data is not None else np.empty(0, np.uint8)
    return pa.LargeStringArray.from_buffers(len(content), offsets, pa.py_buffer(changed))


def _compact(texts: pa.Array) -> pa.Array:
    """Return the array as one piece that begins at its buffers' beginning and has no nulls."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = pc.fill_null(texts.cast(pa.large_string()), "")
    return texts if texts.offset == 0 else texts.take(pa.array(np.arange(len(texts))))


def content_of(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the bytes of all texts one after another, and where each begins; one more offset marks the end."""
    import numpy as np

    texts = _compact(texts)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[: len(texts) + 1]
    content = np.frombuffer(data, np.uint8)[: ends[-1]] if data is not None else np.empty(0, np.uint8)
    return content, ends


def words_of(texts: pa.Array) -> Words:
    """Split texts in one of the two forms above into words."""
    import numpy as np

    content, offsets = content_of(texts)
    hashes, places = [], []
    first = 0
    while first < len(texts):  # blocks of whole texts, so that the powers below stay a short table
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, side="right")) - 1
        last = max(last, first + 1)
        found = _words_of_block(content[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
        hashes.append(found.hash)
        places.append(found.text + first)
        first = last
    if not hashes:
        return Words(np.empty(0, np.uint64), np.empty(0, np.int64))
    return Words(np.concatenate(hashes), np.concatenate(places))


def _words_of_block(content: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Words:
    import numpy as np

    inside = np.empty(len(content) + 1, bool)
    inside[:-1] = content != ord(" ")
    inside[-1] = False
    begins = inside[:-1].copy()
    begins[1:] &= ~inside[:-2]
    at_begin = offsets[:-1][offsets[:-1] < len(content)]
    begins[at_begin] = inside[:-1][at_begin]
    starts = np.flatnonzero(begins)
    stops = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1  # before a space or the end
    cut = offsets[1:-1]
    cut = cut[(cut > 0) & (cut < len(content))]
    cut = np.unique(cut[inside[cut - 1] & inside[cut]])  # words that end where the next text begins with one
    stops = np.sort(np.concatenate([stops, cut])) if len(cut) else stops
    powers, inverse = _powers(1 << len(content).bit_length())
    sums = np.zeros(len(content) + 1, np.uint64)
    np.cumsum((content.astype(np.uint64) + np.uint64(1)) * powers[: len(content)], out=sums[1:])
    hashes = mixed((sums[stops] - sums[starts]) * inverse[starts])
    return Words(hashes, np.searchsorted(offsets, starts, side="right") - 1)


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Compute the first powers of the base and of its inverse, modulo 2^64."""
    import numpy as np

    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        table = np.full(count + 1, base, np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table, out=table))
    return tables[0], tables[1]


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread values over all 64 bits (the finisher of SplitMix64)."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def runs(words: Words, size: int) -> Words:
    """Hash every run of `size` words (n-gram) that stands in one text."""
    import numpy as np

    count = len(words.hash) - size + 1
    if count <= 0:
        return Words(np.empty(0, np.uint64), np.empty(0, np.int64))
    total = np.zeros(count, np.uint64)
    for place in range(size):
        total = total * np.uint64(_BASE) + words.hash[place : place + count]
    whole = words.text[:count] == words.text[size - 1 :]
    return Words(mixed(total[whole]), words.text[:count][whole])


def whole_hash(words: Words, texts: int) -> NDArray[np.uint64]:
    """Hash each text whole, (texts,) uint64: equal for equal words in equal order, and 0 for no words."""
    import numpy as np

    starts = np.searchsorted(words.text, np.arange(texts))
    place = np.arange(len(words.hash)) - starts[words.text]
    salted = mixed(words.hash + mixed(place.astype(np.uint64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(salted, dtype=np.uint64)])
    stops = np.append(starts[1:], len(words.hash))
    return np.where(stops > starts, mixed(sums[stops] - sums[starts] + (stops - starts).astype(np.uint64)), 0)


def hashes_of(texts: pa.Array) -> NDArray[np.uint64]:
    """Hash each text, (texts,) uint64: equal for texts that are equal, symbol by symbol, and 0 for no text."""
    return whole_hash(words_of(equality_form(texts)), len(texts))
