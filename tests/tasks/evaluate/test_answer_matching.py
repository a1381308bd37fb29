from __future__ import annotations

from decimal import Decimal

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tasks.evaluate.answer_matching import corpus_figures, extract_answer, normalize_answer, number_in, score_answer
from tasks.evaluate.suite_params import AnswerPattern, Generate

PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("a completely different sentence here", "nothing of that kind was said"),
    ("The cat is on the mat.", "The cat is on the mat."),
    ("", "the cat"),
]


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("so 3 + 4 = 7.", "last_number", "7"),
        ("it costs $1,250.50 now", "last_number", "$1,250.50"),
        ("from 12 to -3 degrees", "last_number", "-3"),
        ("x=-734", "last_number", "-734"),
        ("GPT4 says nothing", "last_number", None),
        ("The answer is (B), because A is wrong", "first_letter", "B"),
        ("no letter", "first_letter", None),
        ("\n Paris \nQuestion:", "first_line", "Paris"),
        ("  all of it\n", "whole", "all of it"),
        ("a #### 1,000", AnswerPattern(regex="#### *(.+)"), "1,000"),
        ("true or false", AnswerPattern(regex="true|false"), "false"),
        ("neither", AnswerPattern(regex="true|false"), None),
    ],
)
def test_answers_are_cut_out(text: str, how: object, answer: str | None) -> None:
    assert extract_answer(text, how) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,080", "1080"),
        ("$-3.50", "-3.5"),
        ("8.0", "8"),
        ("−7", "-7"),
        ("25%", "25"),
        ("70000.", "70000"),
        ("1e3", "1000"),
    ],
)
def test_numbers_are_the_same_however_they_are_written(text: str, value: str) -> None:
    assert number_in(text) == Decimal(value)
    assert score_answer(text, [value], "numeric") == 1.0


def test_what_is_no_number_is_never_right() -> None:
    assert number_in("seven") is None
    assert score_answer("seven", ["seven"], "numeric") == 0.0
    assert score_answer("NaN", ["NaN"], "numeric") == 0.0
    assert score_answer("", ["0"], "numeric") == 0.0
    assert score_answer(None, ["x"], "exact") == 0.0


def test_text_is_compared_as_squad_does() -> None:
    assert normalize_answer("The  U.S.A., a Country!") == "u s country"
    assert score_answer("the Beatles!", ["x", "Beatles"], "normalised") == 1.0
    assert score_answer("the Beatles!", ["Beatles"], "exact") == 0.0
    assert score_answer("北京。", ["北京"], "normalised") == 1.0


@pytest.mark.parametrize(("said", "right"), PAIRS)
def test_scores_are_those_of_the_libraries(said: str, right: str) -> None:
    assert score_answer(said, [right], "bleu") == pytest.approx(sacrebleu.sentence_bleu(said, [right]).score / 100)
    assert score_answer(said, [right], "chrf") == pytest.approx(sacrebleu.sentence_chrf(said, [right]).score / 100)
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert score_answer(said, [right], kind) == pytest.approx(RougeScorer([kind]).score(right, said)[kind].fmeasure)


def test_rouge_worked_out_by_hand() -> None:
    """Five of six words in common on both sides, and the longest common subsequence is the same five."""
    assert score_answer("the cat sat on the mat", ["the cat is on the mat"], "rougeL") == pytest.approx(5 / 6)


def test_the_figure_of_a_corpus_is_no_mean_of_sentences() -> None:
    metric = Generate(name="generate", extract="whole", target="whole", match="bleu", stop=[])
    said, right = [p[0] for p in PAIRS], [p[1] for p in PAIRS]
    found = corpus_figures(said, [[each] for each in right], metric)
    assert found == {"corpus_bleu": pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)}
    assert corpus_figures(said, [[e] for e in right], metric.model_copy(update={"match": "exact"})) == {}
    two = corpus_figures(["a b c d e"], [["x", "a b c d e"]], metric)
    assert two == {"corpus_bleu": pytest.approx(100)}


def test_chinese_is_counted_by_characters() -> None:
    found = score_answer("我喜欢吃苹果", ["我喜欢吃香蕉"], "bleu")
    theirs = sacrebleu.sentence_bleu("我喜欢吃苹果", ["我喜欢吃香蕉"], tokenize="zh")
    assert found == pytest.approx(theirs.score / 100)
    assert found > 0
