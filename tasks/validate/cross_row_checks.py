"""Checks across rows: duplicates, contradictions, and contamination by questions that models are evaluated with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.records import held_out, normalized_text
from tasks.text.ngram_overlap import Hits, Index, without_common
from tasks.text.words import Words, hashes_of, mixed, near_form, normal_form, runs, words_of
from tasks.validate.duplicates import Duplicate, NearIndex, exact_duplicates
from tasks.validate.params import Validate
from tasks.validate.prompt_groups import NEAR
from tasks.validate.row_features import TurnColumns, field_of_turns, prompts_of, turn_columns

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

HELD_OUT, HELD_OUT_GROUPS = "held-out rows", "held-out groups"
"""The benchmarks that the split itself makes: rows without and with a stated group. Who states groups says which rows
ask the same, so the questions of those are only looked for whole."""

_BLOCK_ROWS, _THREADS = 8192, 2


class Contamination(NamedTuple):
    """The share of a benchmark that stands in the rows to learn from.

    Attributes:
        questions: how many it has.
        exact: how many stand there word for word.
        overlapping: how many share a run of `validate.contamination_ngram` words with a row.
        rows: how many rows hold one.
    """

    questions: int
    exact: int
    overlapping: int
    rows: int


class CrossRowFlags(NamedTuple):
    """Findings of the comparison, by the number of a row through all kinds.

    Attributes:
        contradiction: (rows,) 1 where another row contradicts this one.
        contamination: (rows,) in how many benchmarks' questions the row was found.
        exact: rows with the same content as one before.
        near: rows with nearly the same content as one before, without the exact ones.
        benchmarks: what was found of each.
        contaminated_by: the benchmarks that each contaminated row was found in.
    """

    contradiction: NDArray[np.int64]
    contamination: NDArray[np.int64]
    exact: list[Duplicate]
    near: list[Duplicate]
    benchmarks: dict[str, Contamination]
    contaminated_by: dict[int, list[str]]


def cross_row_checks(
    tables: Mapping[str, pa.Table], benchmarks: Mapping[str, list[str]], held_out_share: float, params: Validate
) -> CrossRowFlags:
    """Compare every row with every other of its kind, and all of them with the questions of benchmarks.

    Args:
        tables: the rows of each kind.
        benchmarks: the questions of every benchmark.
        held_out_share: the share of groups that is kept for evaluation, `render.held_out`.
        params: what is looked for.
    """
    import numpy as np

    rows = sum(len(table) for table in tables.values())
    contradiction, contamination = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    exact: list[Duplicate] = []
    near: list[Duplicate] = []
    prompts = {kind: prompts_of(table, kind) for kind, table in tables.items()}
    withheld = {kind: _withheld(table, prompts[kind], held_out_share) for kind, table in tables.items()}
    asked = {} if params.checks.contamination.action == "ignore" else _questions(tables, benchmarks, prompts, withheld)
    search = _Search(asked, params.contamination_ngram)
    first = 0
    for kind, table in tables.items():
        if not len(table):
            continue
        looking = params.duplicates.near != "ignore"
        index = NearIndex(*_near_settings(params)) if looking else None
        hashes = []
        for start, seen in _look(table, kind, near=looking):
            hashes.append(seen.hashes)
            search.through(seen, first + start, withheld[kind][start : start + seen.rows])
            if index and seen.near:
                block = table.slice(start, seen.rows)
                index.add(_by_row(seen.near, seen.turns, _not_learnt(block, kind, seen.turns)), seen.rows)
        sides = np.concatenate(hashes)
        contradiction[first : first + len(table)] = _contradictions(sides, table, kind)
        order = np.argsort(-_lengths(table, kind), kind="stable") if params.duplicates.keep == "longest" else None
        ranked = list(range(len(table))) if order is None else order.tolist()
        if params.duplicates.exact != "ignore":
            exact += [_shifted(each, first) for each in exact_duplicates(sides[:, 0], ranked)]
        if index:
            same = {each.row - first for each in exact}
            near += [_shifted(each, first) for each in _near(index, table, kind, [r for r in ranked if r not in same])]
        first += len(table)
    found, contaminated_by = search.found()
    for row, names in contaminated_by.items():
        contamination[row] = len(names)
    return CrossRowFlags(contradiction, contamination, exact, near, found, contaminated_by)


class _Seen(NamedTuple):
    """A block of rows with its texts, their words and hashes.

    Attributes:
        rows: how many.
        turns: their texts.
        words: of the texts; `words.text` is the text.
        whole: (texts,) the hash of each text, equal for equal ones.
        hashes: (rows, 4) what `_row_hashes` makes of them.
        near: the words by which near duplicates are told, where they are looked for.
    """

    rows: int
    turns: TurnColumns
    words: Words
    whole: NDArray[np.uint64]
    hashes: NDArray[np.uint64]
    near: Words | None


def _look(table: pa.Table, kind: str, *, near: bool) -> Iterator[tuple[int, _Seen]]:
    """Yield the blocks of a table in order, a few at a time, so that no more than those are in memory."""

    def see(start: int) -> tuple[int, _Seen]:
        block = table.slice(start, _BLOCK_ROWS)
        turns = turn_columns(block, kind)
        words, whole = words_of(normal_form(turns.text)), hashes_of(turns.text)
        of_symbols = words_of(near_form(turns.text)) if near else None
        return start, _Seen(len(block), turns, words, whole, _row_hashes(block, kind, turns, whole), of_symbols)

    starts = range(0, len(table), _BLOCK_ROWS)
    with ThreadPoolExecutor(_THREADS) as pool:
        for begin in range(0, len(starts), _THREADS):
            yield from pool.map(see, starts[begin : begin + _THREADS])


def _near_settings(params: Validate) -> tuple[float, int, int]:
    return params.duplicates.similarity, params.duplicates.permutations, params.duplicates.bands


def _shifted(duplicate: Duplicate, by: int) -> Duplicate:
    return duplicate._replace(row=duplicate.row + by, kept=duplicate.kept + by)


def _near(index: NearIndex, table: pa.Table, kind: str, ranked: list[int]) -> list[Duplicate]:
    import pyarrow as pa

    flagged = set(index.suspects().tolist())
    suspects = [row for row in ranked if row in flagged]
    some = table.take(pa.array(suspects, pa.int64()))
    turns = turn_columns(some, kind)
    return index.duplicates(suspects, _by_row(words_of(near_form(turns.text)), turns, _not_learnt(some, kind, turns)))


def _by_row(words: Words, turns: TurnColumns, salt: NDArray[np.uint64]) -> Words:
    """Return the words, with the row that each stands in instead of the text; rows of another salt share none."""
    row = turns.row[words.text]
    return Words(words.hash ^ salt[row], row)


def _not_learnt(block: pa.Table, kind: str, turns: TurnColumns) -> NDArray[np.uint64]:
    """Hash which turns of each row are not trained on, (rows,) uint64; 0 where all are."""
    import numpy as np

    result = np.zeros(len(block), np.uint64)
    if kind == "chat":
        learn = block["messages"].combine_chunks().flatten().field("learn").to_numpy(zero_copy_only=False)
        place = np.arange(len(turns.row)) - np.searchsorted(turns.row, turns.row)
        masked = ~learn
        np.add.at(result, turns.row[masked], mixed(place[masked].astype(np.uint64) + np.uint64(1)))
    return result


# --- equal and opposite rows ------------------------------------------------------------------------------------------


def _row_hashes(block: pa.Table, kind: str, turns: TurnColumns, whole: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each row whole, its prompt, and its replies: (rows, 4) uint64; 0 for what it lacks."""
    import numpy as np

    result = np.zeros((len(block), 4), np.uint64)
    result[:, 0] = _said(block, kind, turns, whole)
    if kind in ("preference", "labelled"):
        for column, letter in ((2, "c"), (3, "r")):
            those = turns.letter == ord(letter)
            result[turns.row[those], column] = whole[those]
        prompt = ~np.isin(turns.letter, np.frombuffer(b"cr", np.uint8))
        mixture = whole * (turns.letter.astype(np.uint64) * np.uint64(2) + np.uint64(1))
        np.add.at(result[:, 1], turns.row[prompt], mixture[prompt])
    if kind == "labelled":  # the same reply with another label is no duplicate but a contradiction
        result[:, 0] += block["label"].to_numpy().astype(np.uint64)
    return result


def _said(block: pa.Table, kind: str, turns: TurnColumns, whole: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each row: equal when the same turns say, think and call the same, and the same of them are trained on."""
    import numpy as np
    import pyarrow.compute as pc

    place = np.arange(len(turns.row)) - np.searchsorted(turns.row, turns.row)
    salt = mixed(turns.letter.astype(np.uint64) + mixed(place.astype(np.uint64)))
    parts = np.where(whole > 0, mixed(whole + salt), 0)
    for number, name in enumerate(("calls", "reasoning", "name")):
        if (beside := field_of_turns(block, kind, name)) is not None:
            hashes = hashes_of(beside)
            parts += np.where(hashes > 0, mixed(hashes ^ (salt + np.uint64(number))), 0)
    total = _not_learnt(block, kind, turns)
    np.add.at(total, turns.row, parts)
    if "tools" in block.column_names:
        tools = pc.binary_join(block["tools"].combine_chunks(), "\n")
        total += hashes_of(tools)
    return total


def _contradictions(hashes: NDArray[np.uint64], table: pa.Table, kind: str) -> NDArray[np.int64]:
    """1 where the same reply has the other label, or where a pair's replies stand the other way round."""
    import numpy as np

    if kind == "labelled":
        label = table["label"].to_numpy()
        good, bad = hashes[label, 1], hashes[~label, 1]
        return np.where(label, np.isin(hashes[:, 1], bad), np.isin(hashes[:, 1], good)).astype(np.int64)
    if kind == "preference":
        stated = set(zip(*(hashes[:, column].tolist() for column in (1, 2, 3)), strict=True))
        turned = zip(*(hashes[:, column].tolist() for column in (1, 3, 2)), strict=True)
        differ = hashes[:, 2] != hashes[:, 3]
        return np.where(differ, np.array([pair in stated for pair in turned], np.int64), 0)
    return np.zeros(len(table), np.int64)


def _lengths(table: pa.Table, kind: str) -> NDArray[np.int64]:
    import numpy as np
    import pyarrow.compute as pc

    turns = turn_columns(table, kind)
    return np.bincount(turns.row, weights=pc.utf8_length(turns.text).to_numpy(), minlength=len(table)).astype(np.int64)


# --- contamination ----------------------------------------------------------------------------------------------------


def questions_of(tables: Mapping[str, pa.Table]) -> list[str]:
    """List a benchmark's questions: the first user turn of its rows of whatever kind, or the whole of a plain text."""
    asked = [text for kind, table in tables.items() for text in prompts_of(table, kind)]
    texts = tables["text"]["text"].to_pylist() if "text" in tables else []
    return [text for text in [*asked, *texts] if text]


def _withheld(table: pa.Table, prompts: list[str], share: float) -> NDArray[np.bool_]:
    """Tell which rows `render` will hold out: the same function of the same names."""
    import numpy as np

    groups = table["group"].to_pylist()
    named = (group or normalized_text(prompt) for group, prompt in zip(groups, prompts, strict=True))
    return np.array([bool(name) and held_out(name, share) for name in named], bool)


def _questions(
    tables: Mapping[str, pa.Table],
    benchmarks: Mapping[str, list[str]],
    prompts: Mapping[str, list[str]],
    withheld: Mapping[str, NDArray[np.bool_]],
) -> dict[str, list[str]]:
    """Collect the questions of each benchmark, and of the rows that are held out."""
    held: dict[str, set[str]] = {HELD_OUT: set(), HELD_OUT_GROUPS: set()}
    for kind, table in tables.items():
        for group, text, out in zip(table["group"].to_pylist(), prompts[kind], withheld[kind], strict=True):
            if out:
                stated = group and not group.startswith(NEAR)
                held[HELD_OUT_GROUPS if stated else HELD_OUT].add(text)
    return dict(benchmarks) | {name: sorted(texts) for name, texts in held.items() if texts}


def _learning(words: Words, row: NDArray[np.int64], withheld: NDArray[np.bool_]) -> Words:
    """Keep the words of rows that are not held out."""
    kept = ~withheld[row[words.text]]
    return Words(words.hash[kept], words.text[kept])


class _Search:
    """Looks for the questions of all benchmarks in one block after another."""

    def __init__(self, questions: Mapping[str, list[str]], run_words: int) -> None:
        import pyarrow as pa

        self._run_words = run_words
        self._questions = {name: len(texts) for name, texts in questions.items()}
        self._hits: dict[str, list[Hits]] = {name: [] for name in questions}
        self._indexes = {
            name: Index(pa.array(texts, pa.large_string()), None if name == HELD_OUT_GROUPS else run_words)
            for name, texts in questions.items()
        }

    def through(self, seen: _Seen, first: int, withheld: NDArray[np.bool_]) -> None:
        """Search a block whose first row has this number; held-out questions are searched in the other rows alone."""
        import numpy as np

        row = seen.turns.row
        filled = np.flatnonzero(seen.whole)
        whole, found = Words(seen.whole[filled], filled), runs(seen.words, self._run_words)
        for name, index in self._indexes.items():
            searched = (whole, found)
            if name in (HELD_OUT, HELD_OUT_GROUPS):
                searched = (_learning(whole, row, withheld), _learning(found, row, withheld))
            hits = index.search(*searched)
            self._hits[name].append(hits._replace(text=first + row[hits.text]))

    def found(self) -> tuple[dict[str, Contamination], dict[int, list[str]]]:
        """Return the hits of each benchmark, and the benchmarks that each leaking row holds a question of."""
        import numpy as np

        benchmarks: dict[str, Contamination] = {}
        contaminated_by: dict[int, list[str]] = {}
        for name, blocks in self._hits.items():
            hits = Hits(*(np.concatenate(each) for each in zip(*blocks, strict=True)))
            if name == HELD_OUT:  # rows of one source share its phrases with the rows held out of it
                hits = without_common(hits)
            rows = np.unique(hits.text).tolist()
            exact, overlapping = (len(np.unique(hits.question[some])) for some in (hits.run == 0, hits.run != 0))
            benchmarks[name] = Contamination(self._questions[name], exact, overlapping, len(rows))
            for row in rows:
                contaminated_by.setdefault(row, []).append(name)
        return benchmarks, contaminated_by
