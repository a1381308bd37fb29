"""Words, runs, duplicates and leaks against plain Python over the same texts."""

from __future__ import annotations

import re
import unicodedata
from random import Random

import numpy as np
import pyarrow as pa
import pytest

from tasks.core.records import normalized_text
from tasks.text import words as module
from tasks.text.ngram_overlap import COMMON, Hits, Index, without_common
from tasks.text.words import Words, equality_form, hashes_of, normal_form, runs, whole_hash, words_of
from tasks.validate.duplicates import NearIndex, exact_duplicates

TEXTS = [
    "Hello, World!",
    "hello",
    "  ",
    "",
    "你好 World a",
    "ｆｕｌｌ　width",
    "café déjà",
    "a_b c-d",
    "x" * 50,
    "end",
    "2.5",
]


def plainly(text: str) -> list[str]:
    """The same words in a line of Python."""
    text = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower())
    return re.sub(r"([\u3040-\u30ff\u4e00-\u9fff])", r" \1 ", text).split()


def words(texts: list[str]) -> Words:
    return words_of(normal_form(pa.array(texts)))


def random_texts(count: int) -> list[str]:
    draw = Random(7)
    vocabulary = ["cat", "Dog", "红", "色的", "42", "é", "ß", "naïve", "ＡＢ", "x1", "--", "\n", "?"]
    return [" ".join(draw.choices(vocabulary, k=draw.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("texts", [TEXTS, random_texts(300)])
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_words_are_those_of_plain_python(texts: list[str], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many in each text; and two hashes are equal just when the two words are, wherever they stand."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    found, expected = words(texts), [word for text in texts for word in plainly(text)]
    assert np.bincount(found.text, minlength=len(texts)).tolist() == [len(plainly(text)) for text in texts]
    assert len(dict(zip(found.hash.tolist(), expected, strict=True))) == len(set(expected))
    assert len(set(zip(found.hash.tolist(), expected, strict=True))) == len(set(expected))


def test_a_slice_is_read_as_itself() -> None:
    whole = pa.array(TEXTS, pa.large_string())
    assert words_of(normal_form(whole.slice(4, 3))).hash.tolist() == words(TEXTS[4:7]).hash.tolist()


def test_runs_stay_within_one_text() -> None:
    texts = random_texts(60)
    found = runs(words(texts), 3)
    expected = [
        (place, tuple(plainly(t)[i : i + 3])) for place, t in enumerate(texts) for i in range(len(plainly(t)) - 2)
    ]
    assert found.text.tolist() == [place for place, _ in expected]
    assert len(set(zip(found.hash.tolist(), (run for _, run in expected), strict=True))) == len(
        {r for _, r in expected}
    )


DIFFERENT = [
    ("8 - 2", "8 + 2"),
    ("Is 3 < 5?", "Is 3 > 5?"),
    ("x -> !x", "x -> x"),
    ("(-2)**2", "-2**2"),
    ("a == b", "a = b"),
    (r"\frac{1}{2}", r"\frac12"),
    ("2² and 3", "22 and 3"),
    ("½", "1/2"),
    ("∀x", "∃x"),
    ("北京是", "北京 是"),
    ("f(x)", "f x"),
]
SAME = [
    ("What is  ２＋２？\n", "what is 2+2?"),
    ("e\u0301", "\u00e9"),
    ("Straße", "STRASSE"),
    ("ｶﾞ", "ガ"),
    ("a\x1cb", "A\u3000b"),
]


def test_equal_is_what_differs_in_case_width_composition_and_space_alone() -> None:
    for one, other in DIFFERENT:
        assert normalized_text(one) != normalized_text(other)
    for one, other in SAME:
        assert normalized_text(one) == normalized_text(other)
    texts = [text for pair in DIFFERENT + SAME for text in pair] + TEXTS
    formed = [" ".join(text.split()) for text in equality_form(pa.array(texts)).to_pylist()]
    assert formed == [normalized_text(text) for text in texts]  # of whole arrays as of one text
    hashes = hashes_of(pa.array(texts)).tolist()
    for number, text in enumerate(texts):
        same = [other for other in range(len(texts)) if normalized_text(texts[other]) == normalized_text(text)]
        assert [other for other in range(len(texts)) if hashes[other] == hashes[number]] == same


def test_a_whole_text_is_its_words_in_order() -> None:
    hashes = whole_hash(words(["a b", "A, b.", "b a", "ab", "a b c", "", "!"]), 7)
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:6].tolist())) == 5
    assert hashes[5] == hashes[6] == 0


def test_equal_texts_are_found_but_not_wordless_ones() -> None:
    hashes = whole_hash(words(["a b", "c", "A b!", "", "?", "a b"]), 6)
    assert [d[:2] for d in exact_duplicates(hashes, range(6))] == [(2, 0), (5, 0)]
    assert [d[:2] for d in exact_duplicates(hashes, [5, 4, 3, 2, 1, 0])] == [(2, 5), (0, 5)]


def test_near_duplicates_are_those_of_all_pairs() -> None:
    """Each kept text is compared with every other by brute force; the sketch may miss with probability 1e-9 here."""
    draw = Random(3)
    vocabulary = [f"w{n}" for n in range(400)]
    originals = [draw.choices(vocabulary, k=60) for _ in range(40)]
    changed = [[draw.choice(vocabulary) if draw.random() < 0.03 else word for word in text] for text in originals]
    texts = [" ".join(text) for text in originals + changed]
    found = words(texts)
    index = NearIndex(0.6, 128, 64)
    index.add(Words(found.hash[found.text < 30], found.text[found.text < 30]), 30)
    index.add(Words(found.hash[found.text >= 30], found.text[found.text >= 30] - 30), 50)
    suspects = index.suspects().tolist()
    duplicates = index.duplicates(suspects, words([texts[row] for row in suspects]))

    shingles = [{tuple(text.split()[i : i + 3]) for i in range(58)} for text in texts]
    kept: list[int] = []
    expected = {}
    for row, own in enumerate(shingles):
        best = max(((len(own & shingles[k]) / len(own | shingles[k]), -k) for k in kept), default=(0.0, 0))
        if best[0] >= 0.6:
            expected[row] = (-best[1], best[0])
        else:
            kept.append(row)
    assert len(expected) > 10
    assert {d.row: (d.kept, round(d.similarity, 9)) for d in duplicates} == {
        row: (kept_row, round(share, 9)) for row, (kept_row, share) in expected.items()
    }


def test_texts_without_words_are_nobodys_near_duplicate() -> None:
    index = NearIndex(0.5, 16, 4)
    index.add(words(["", "", "one two"]), 3)
    assert index.duplicates(index.suspects().tolist(), words([""] * len(index.suspects()))) == []


def search(questions: list[str], texts: list[str], run_words: int | None = 5) -> Hits:
    found = words(texts)
    whole = hashes_of(pa.array(texts))
    filled = np.flatnonzero(whole)
    index = Index(pa.array(questions), run_words)
    return index.search(Words(whole[filled], filled), runs(found, run_words or 5))


def test_questions_are_found_whole_and_in_part() -> None:
    questions = ["one two three four five six", "what  is twelve plus seven?", "go on"]
    texts = ["so: two three four five SIX, yes", "What is twelve plus seven?", "go on", "four five six seven eight", ""]
    hits = search(questions, texts)
    assert set(zip(hits.text.tolist(), hits.question.tolist(), (hits.run == 0).tolist(), strict=True)) == {
        (0, 0, False),
        (1, 1, True),
        (1, 1, False),
    }
    assert set(search(questions, texts, None).text.tolist()) == {1}


def test_runs_that_stand_everywhere_count_for_nothing() -> None:
    boiler = "please choose the correct answer to"
    questions = [f"{boiler} question {n}" for n in range(COMMON + 1)]
    assert not len(search(questions, [f"{boiler} whatever"]).text)
    few = search(["one two three four five"], ["one two three four five six"] * COMMON)
    many = search(["one two three four five"], ["one two three four five six"] * (COMMON + 1))
    assert len(without_common(few).text) == COMMON
    assert not len(without_common(many).text)
