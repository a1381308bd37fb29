"""From what number a file counts the choices of its questions, where answers are numbers: from 0 or from 1.

One answer does not tell. All of a file do, if one of them is 0, or is as large as there are choices. So does a file in
which letters stand beside numbers, as in ARC (arXiv:1803.05457): what has letters for some questions has names for all,
and names begin with 1. Where nothing tells, params must.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from tasks.core.errors import BadData

_LETTER = re.compile(r"\(?[A-Za-z][).]?")

NumberedFrom: TypeAlias = Literal["auto", 0, 1]


def number_of(answer: Any) -> int | None:
    """Return the number that an answer is, given as one or as digits; None for a letter or a text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    return int(answer) if isinstance(answer, str) and answer.strip().isdecimal() else None


def numbered_from(answers: Iterable[tuple[Any, int]], stated: NumberedFrom, where: str) -> int:
    """Return the number of the first choice.

    Args:
        answers: the answer of each question of a file, and how many choices it has.
        stated: what params say.
        where: the file, for errors.

    Raises:
        BadData: the answers contradict each other, or do not tell.
    """
    if stated != "auto":
        return stated
    zero = last = named = digits = False
    for answer, choices in answers:
        number = number_of(answer)
        zero, last = zero or number == 0, last or number == choices > 0
        named = named or (isinstance(answer, str) and _LETTER.fullmatch(answer.strip()) is not None)
        digits = digits or (isinstance(answer, str) and number is not None)
    if zero and last:
        raise BadData(
            "numbers its choices from 0 and from 1",
            where=where,
            got="an answer 0, and one as large as there are choices",
            fix="correct the rows, or say numbered_from in params",
        )
    if digits and not (zero or last or named):
        raise BadData(
            "does not tell whether its choices are numbered from 0 or from 1",
            where=where,
            got="no answer that is 0, and none that is as large as there are choices",
            fix="say numbered_from: 0 or numbered_from: 1 in params",
        )
    return (
        1 if last or (named and digits and not zero) else 0
    )  # a program's numbers, not written as text, are places in a list
