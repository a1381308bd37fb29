"""Answers cut out of what a model wrote, and compared with what is right: pure text, from 0 (wrong) to 1 (right)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tasks.evaluate.suite_params import AnswerPattern, Extract, Generate

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

_NUMBER = re.compile(r"(?<![\w.])[-+−]?[$€£¥]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![\w.])[-+−]?[$€£¥]?\.\d+")
_LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


# --- cut out ----------------------------------------------------------------------------------------------------------


def extract_answer(text: str, how: Extract) -> str | None:
    """Extract the answer from a text; None where there is none."""
    if isinstance(how, AnswerPattern):
        found = list(re.finditer(how.regex, text))
        return _group(found[-1]) if found else None
    if how == "whole":
        return text.strip()
    if how == "first_line":
        return text.strip().partition("\n")[0].strip()
    if how == "first_letter":
        letter = _LETTER.search(text)
        return letter.group(1) if letter else None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _group(match: re.Match[str]) -> str:
    return ((match.group(1) if match.re.groups else match.group()) or "").strip()


def number_in(text: str) -> Decimal | None:
    """Parse the number that a text is, whatever its thousands commas, currency, per cent sign or trailing zeros."""
    plain = re.sub(r"[\s,$€£¥%]", "", text.strip().rstrip(".")).replace("−", "-")
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD compares answers (arXiv:1606.05250): no case, punctuation, articles, needless space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(" " if c in string.punctuation or unicodedata.category(c).startswith("P") else c for c in folded)
    return " ".join(_ARTICLE.sub(" ", bare).split())


# --- compare ----------------------------------------------------------------------------------------------------------


def score_answer(prediction: str | None, references: Sequence[str], match: str) -> float:
    """Score how well an answer agrees with the best of several references, 0 to 1; 0 where there is no answer."""
    if prediction is None:
        return 0.0
    return max(_MATCHES[match](prediction, reference) for reference in references)


def _exact(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def _normalised(prediction: str, reference: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(reference))


def _numeric(prediction: str, reference: str) -> float:
    said, right = number_in(prediction), number_in(reference)
    return float(said is not None and said == right)


def _bleu(prediction: str, reference: str) -> float:
    scorer = bleu(is_chinese(reference), sentence=True)
    return float(scorer.sentence_score(prediction, [reference]).score / 100)


def _chrf(prediction: str, reference: str) -> float:
    return float(chrf().sentence_score(prediction, [reference]).score / 100)


def _rouge(prediction: str, reference: str, kind: str) -> float:
    return float(_rouge_scorer(kind).score(reference, prediction)[kind].fmeasure)


_MATCHES: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "normalised": _normalised,
    "numeric": _numeric,
    "bleu": _bleu,
    "chrf": _chrf,
    **{kind: partial(_rouge, kind=kind) for kind in ("rouge1", "rouge2", "rougeL")},
}


def corpus_figures(predictions: Sequence[str], references: Sequence[Sequence[str]], metric: Generate) -> dict[str, Any]:
    """BLEU or chrF of all answers together, as papers report it (0 to 100); nothing for other metrics."""
    if metric.match not in ("bleu", "chrf"):
        return {}
    most = max(map(len, references))
    streams: list[Any] = [[each[n] if n < len(each) else None for each in references] for n in range(most)]
    scorer = bleu(is_chinese(references[0][0])) if metric.match == "bleu" else chrf()
    return {f"corpus_{metric.match}": float(scorer.corpus_score(list(predictions), streams).score)}


def is_chinese(text: str) -> bool:
    """Return whether a text is mostly written in Chinese characters, which BLEU counts one by one."""
    return sum("\u4e00" <= c <= "\u9fff" for c in text) * 2 > len(text)


@lru_cache
def bleu(chinese: bool, *, sentence: bool = False) -> BLEU:
    """Build sacrebleu's BLEU (arXiv:1804.08771); of single sentences only n-grams count that they have."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="zh" if chinese else "13a", effective_order=sentence)


@lru_cache
def chrf() -> CHRF:
    """Build sacrebleu's chrF2 (Popović 2015)."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@lru_cache
def _rouge_scorer(kind: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False)
