from __future__ import annotations

from typing import Any

import pytest

from tasks.core.errors import BadData
from tasks.readers.numbered_answers import numbered_from


@pytest.mark.parametrize(
    ("answers", "first"),
    [
        (["0", "2", "1"], 0),
        (["1", "4", "2"], 1),  # of four choices
        (["A", "1", "D"], 1),  # as ARC has both
        ([0, 3, 1], 0),
        ([1, 4], 1),
        ([1, 2], 0),  # numbers that a program wrote are places in a list
        (["A", "B"], 0),
        ([], 0),
    ],
)
def test_all_answers_of_a_file_tell_what_one_does_not(answers: list[Any], first: int) -> None:
    assert numbered_from([(answer, 4) for answer in answers], "auto", "f") == first


@pytest.mark.parametrize(("answers", "said"), [(["1", "2"], "does not tell"), (["0", "4"], "from 0 and from 1")])
def test_what_nothing_tells_params_must(answers: list[str], said: str) -> None:
    with pytest.raises(BadData, match=said) as caught:
        numbered_from([(answer, 4) for answer in answers], "auto", "f")
    assert "numbered_from" in caught.value.fix
    assert [numbered_from([(a, 4) for a in answers], stated, "f") for stated in (0, 1)] == [0, 1]
