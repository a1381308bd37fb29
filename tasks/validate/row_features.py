"""One line of facts per row, from whole columns at once: the columns that expectations are held against.

Texts stay in Arrow; counts come from passes over their bytes and from regular expressions that run outside Python.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import is_normalized

from tasks.text.patterns import PATTERNS, TextPattern, matches
from tasks.text.refusals import refusing
from tasks.text.words import content_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


ROLE_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
_BLOCK_ROWS = 16384
_THREADS = 2

SCRIPTS = ("latin", "han", "kana", "hangul", "cyrillic", "other")
"""What letters are told apart by; a word of Latin letters counts as much as one character of the others' words."""


class TurnColumns(NamedTuple):
    """Every text of a table, row after row.

    Attributes:
        row: the row that each text is of, (texts,), nondecreasing.
        text: the texts.
        letter: who says it, as one byte each: s, u, a, t, and for the two replies of a pair c and r.
    """

    row: NDArray[np.int64]
    text: pa.LargeStringArray
    letter: NDArray[np.uint8]


def turn_columns(table: pa.Table, kind: str) -> TurnColumns:
    """Return the texts of rows of one kind, with the role of each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    rows, texts, letters = [], [], []
    for name, said_by in _TEXTS[kind]:
        column = table[name].combine_chunks()
        if said_by:
            rows.append(np.arange(len(column)))
            texts.append(column.cast(pa.large_string()))
            letters.append(np.full(len(column), ord(said_by), np.uint8))
            continue
        flat = column.flatten()
        rows.append(pc.list_parent_indices(column).to_numpy().astype(np.int64))
        texts.append(flat.field("content").cast(pa.large_string()))
        letters.append(_letters(flat.field("role")))
    row, text, letter = np.concatenate(rows), pa.concat_arrays(texts), np.concatenate(letters)
    if len(rows) > 1:
        order = np.argsort(row, kind="stable")
        row, text, letter = row[order], text.take(pa.array(order)), letter[order]
    return TurnColumns(row, text, letter)


_TEXTS = {
    "chat": (("messages", ""),),
    "preference": (("prompt", ""), ("chosen", "c"), ("rejected", "r")),
    "labelled": (("prompt", ""), ("reply", "a")),
    "text": (("text", "x"),),
    "pair": (("input", "u"), ("target", "a")),
}


def turn_of_rows(turns: TurnColumns, letters: str, rows: int, *, last: bool = False) -> pa.LargeStringArray:
    """Return the first or the last turn that one of these letters says, of each row; null where there is none."""
    import numpy as np
    import pyarrow as pa

    said = np.flatnonzero(np.isin(turns.letter, np.frombuffer(letters.encode(), np.uint8)))
    place = np.full(rows, -1)
    ordered = said if last else said[::-1]  # of several values for one row the last one stays
    place[turns.row[ordered]] = ordered
    return turns.text.take(pa.array(place, mask=place < 0))


def prompts_of(table: pa.Table, kind: str) -> list[str]:
    """Return the first user turn of each row; nothing for plain texts."""
    prompts: list[str] = turn_of_rows(turn_columns(table, kind), "u", len(table)).fill_null("").to_pylist()
    return prompts


def field_of_turns(table: pa.Table, kind: str, name: str) -> pa.LargeStringArray | None:
    """Return a field of each chat turn as text; None for kinds whose turns have no more than their text."""
    import pyarrow as pa

    if kind != "chat":
        return None
    return table["messages"].combine_chunks().flatten().field(name).cast(pa.large_string())


def _letters(roles: pa.Array) -> NDArray[np.uint8]:
    import numpy as np

    encoded = roles.dictionary_encode()
    letters = [ord(ROLE_LETTERS.get(role, "?")) for role in encoded.dictionary.to_pylist()]
    return np.array(letters, np.uint8)[encoded.indices.to_numpy()] if letters else np.empty(0, np.uint8)


def row_features(table: pa.Table, kind: str) -> pd.DataFrame:
    """Compute the facts of rows of one kind, (rows, facts): numbers, but for `roles` and the scripts, which are text.

    What a kind of row does not have is null there.
    """
    import pandas as pd

    if table.num_rows == 0:
        return pd.DataFrame(columns=list(FEATURE_COLUMNS))
    blocks = [table.slice(start, _BLOCK_ROWS) for start in range(0, table.num_rows, _BLOCK_ROWS)]
    with ThreadPoolExecutor(_THREADS) as pool:  # the passes below run outside Python's lock
        return pd.concat(list(pool.map(lambda block: _facts(block, kind), blocks)), ignore_index=True)


FEATURE_COLUMNS = (
    "turns",
    "roles",
    "shortest_turn",
    "characters",
    "words",
    "prompt_turns",
    "prompt_characters",
    "prompt_words",
    "script",
    "question_script",
    "reply_script",
    "outer_space",
    "control_characters",
    "unicode_normalization",
    "refusals",
    "same_replies",
    "prefix_replies",
    "calls",
    "tools",
    *PATTERNS,
)


def _facts(table: pa.Table, kind: str) -> pd.DataFrame:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.num_rows
    turns = turn_columns(table, kind)

    def total(per_turn: Any) -> NDArray[np.int64]:
        return np.bincount(turns.row, weights=per_turn, minlength=rows).astype(np.int64)

    letters = _count_letters(turns.text)
    calls, reasoning = (field_of_turns(table, kind, name) for name in ("calls", "reasoning"))
    calling = (
        np.zeros(len(turns.row), bool) if calls is None else pc.not_equal(calls, "").to_numpy(zero_copy_only=False)
    )
    facts: dict[str, Any] = {
        "turns": np.bincount(turns.row, minlength=rows),
        "roles": _roles(turns, rows, kind).to_pandas(),
        # who only calls a tool says nothing by right
        "shortest_turn": _least(np.where(calling, np.inf, letters["visible"]), turns.row, rows),
        "characters": total(letters["characters"]),
        "words": total(letters["words"]),
        "outer_space": total(matches(turns.text, TextPattern(r"\A\s|\s\z"))),
        "control_characters": total(letters["control"]),
        "unicode_normalization": total(_unnormalized(turns.text)),
        "calls": np.full(rows, np.nan) if calls is None else total(calling).astype(float),
        "tools": _tools(table),
    }
    replies = np.isin(turns.letter, np.frombuffer(b"acr", np.uint8))
    asked = turns.letter == ord("u")
    prompt = ~(replies | (turns.letter == ord("x")))
    for name, counts in (("turns", 1), ("characters", letters["characters"]), ("words", letters["words"])):
        facts[f"prompt_{name}"] = np.full(rows, np.nan) if kind == "text" else total(prompt * counts).astype(float)
    refusals = np.zeros(len(turns.row), np.int64)
    refusals[replies] = refusing(turns.text.filter(pa.array(replies)))
    facts["refusals"] = total(refusals)
    scripts = np.stack([letters[script] for script in SCRIPTS], axis=1)
    facts["script"] = _script(_by_row(scripts, turns.row, rows)).fill_null("none").to_pandas()
    for name, who in (("question_script", asked), ("reply_script", replies)):
        facts[name] = _script(_by_row(scripts * who[:, None], turns.row, rows)).to_pandas()
    facts |= _same(table, kind, rows)
    scanned = turns.text
    for beside in (calls, reasoning):  # an address or a key may stand there, too
        if beside is not None and pc.any(pc.not_equal(beside, "")).as_py():
            scanned = pc.binary_join_element_wise(scanned, beside, pa.scalar("\n", pa.large_string()))
    for name, patterns in PATTERNS.items():
        facts[name] = total(sum(matches(scanned, pattern, count=True) for pattern in patterns))
    return pd.DataFrame(facts, columns=list(FEATURE_COLUMNS))


_ASCII_LETTERS, _DIGITS, _CONTROL, _LEAD, _FOLLOWS, _SPACE = range(len(SCRIPTS), len(SCRIPTS) + 6)


def _byte_classes() -> NDArray[np.uint8]:
    """Return the class of a character by its first byte in UTF-8."""
    import numpy as np

    table = np.full(256, _LEAD, np.uint8)
    table[:0x20] = _CONTROL
    table[[0x7F]] = _CONTROL
    table[[0x09, 0x0A, 0x0D, 0x20]] = _SPACE
    table[ord("0") : ord("9") + 1] = _DIGITS
    table[ord("A") : ord("Z") + 1] = table[ord("a") : ord("z") + 1] = _ASCII_LETTERS
    table[0x80:0xC0] = _FOLLOWS
    table[0xC3:0xC6] = _ASCII_LETTERS  # Latin letters with marks
    table[0xC6:0xD0] = table[0xD4:0xE3] = SCRIPTS.index("other")
    table[0xD0:0xD4] = SCRIPTS.index("cyrillic")
    table[0xE2] = _LEAD  # general punctuation and symbols
    table[0xE3] = SCRIPTS.index("kana")  # CJK punctuation too, which is taken out below
    table[0xE4:0xEA] = SCRIPTS.index("han")
    table[0xEA:0xEE] = SCRIPTS.index("hangul")
    return table


def _count_letters(texts: pa.Array) -> dict[str, NDArray[np.int64]]:
    """Characters, words, control characters and letters by script of each text, from one look at each byte."""
    import numpy as np

    content, offsets = content_of(texts)
    classes = _byte_classes()[content]
    if (content == 0xE3).any():
        ideographic = np.flatnonzero(content == 0xE3)
        punctuation = ideographic[
            (ideographic + 1 < len(content)) & (content[(ideographic + 1) % len(content)] == 0x80)
        ]
        classes[punctuation] = _LEAD
    sums = np.zeros(len(content) + 1, np.int64)

    def per_text(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        np.cumsum(mask, out=sums[1:])
        return sums[offsets[1:]] - sums[offsets[:-1]]

    wordlike = (classes == _ASCII_LETTERS) | (classes == _DIGITS)
    begins = wordlike.copy()
    begins[1:] &= ~(wordlike[:-1] | (classes[:-1] == _FOLLOWS))
    starts = offsets[:-1][offsets[:-1] < len(content)]
    begins[starts] = wordlike[starts]  # whatever the text before it ends with
    counts = {
        "characters": per_text(classes != _FOLLOWS),
        "control": per_text(classes == _CONTROL)
        if (classes == _CONTROL).any()
        else np.zeros(len(offsets) - 1, np.int64),
    }
    latin_words = per_text(begins)
    wide = bool((content >= 0x80).any())
    counts |= {
        script: per_text(classes == place) if wide else np.zeros(len(offsets) - 1, np.int64)
        for place, script in enumerate(SCRIPTS)
    }
    counts["latin"] = latin_words
    counts["words"] = latin_words + sum(counts[script] for script in SCRIPTS[1:])
    counts["visible"] = counts["characters"] - per_text(classes == _SPACE)
    return counts


def _by_row(values: NDArray[np.int64], row: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    import numpy as np

    return np.stack([np.bincount(row, weights=column, minlength=rows) for column in values.T], axis=1).astype(np.int64)


def _script(counts: NDArray[np.int64]) -> pa.StringArray:
    """Return the script that most words of each row are in; null for fewer than four words."""
    import numpy as np
    import pyarrow as pa

    weighed = counts.astype(float)
    weighed[:, 1:4] /= 1.5  # characters to a word, about, in Chinese, Japanese and Korean
    weighed[:, 4:] /= 6  # letters to a word elsewhere
    japanese = weighed[:, 2] > 0.1 * weighed[:, 1]  # kana beside Chinese characters
    weighed[:, 2] += np.where(japanese, weighed[:, 1], 0)
    weighed[:, 1] = np.where(japanese, 0, weighed[:, 1])
    return pa.array(SCRIPTS).take(pa.array(weighed.argmax(axis=1), mask=weighed.sum(axis=1) < 4))


def _roles(turns: TurnColumns, rows: int, kind: str) -> pa.LargeStringArray:
    """Join the letters of each row's turns into one text; the two replies of a pair are one turn."""
    import numpy as np
    import pyarrow as pa

    if kind == "text":
        return pa.nulls(rows, pa.large_string())
    kept = turns.letter != ord("r")
    letters = np.where(turns.letter[kept] == ord("c"), ord("a"), turns.letter[kept]).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(turns.row[kept], minlength=rows))])
    return pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(letters))


def _least(values: NDArray[np.float64], row: NDArray[np.int64], rows: int) -> NDArray[np.float64]:
    """Return the least finite value of each row; NaN where it has none."""
    import numpy as np

    least = np.full(rows, np.inf)
    np.minimum.at(least, row, values)
    return np.where(np.isinf(least), np.nan, least)


def _tools(table: pa.Table) -> NDArray[np.float64]:
    """Count the tools that each row declares; NaN for a kind that can declare none."""
    import numpy as np
    import pyarrow.compute as pc

    if "tools" not in table.column_names:
        return np.full(table.num_rows, np.nan)
    declared: NDArray[np.float64] = pc.list_value_length(table["tools"]).to_numpy().astype(float)
    return declared


def _unnormalized(texts: pa.Array) -> NDArray[np.int64]:
    """1 for each text that is not in Unicode's composed form (NFC)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    found = np.zeros(len(texts), np.int64)
    wide = np.flatnonzero(~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False))
    # not by pyarrow's utf8_normalize: of release 25.0.1, its NFC leaves letters decomposed
    found[wide] = [not is_normalized("NFC", text) for text in texts.take(pa.array(wide)).to_pylist()]
    return found


def _same(table: pa.Table, kind: str, rows: int) -> dict[str, NDArray[np.float64]]:
    """Compute whether the two replies of a pair are the same, and whether one is a beginning of the other."""
    import numpy as np
    import pyarrow.compute as pc

    if kind != "preference":
        return {name: np.full(rows, np.nan) for name in ("same_replies", "prefix_replies")}
    chosen, rejected = (pc.utf8_trim_whitespace(table[name].combine_chunks()) for name in ("chosen", "rejected"))
    same = pc.equal(chosen, rejected).to_numpy(zero_copy_only=False)
    pairs = zip(chosen.to_pylist(), rejected.to_pylist(), strict=True)
    prefix = np.array([one.startswith(other) or other.startswith(one) for one, other in pairs], bool)
    return {"same_replies": same.astype(float), "prefix_replies": (prefix & ~same).astype(float)}
