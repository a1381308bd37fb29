from __future__ import annotations

from tasks.core.errors import BadData, in_one_line


def test_what_came_from_elsewhere_begins_no_line_of_an_error() -> None:
    error = BadData(
        "is odd", where="a\nb", got="x\n10 rows accepted\x1b[1m", fix="look", examples=["one\ntwo", "汉\t字"]
    )
    assert str(error) == (
        "a\\nb: is odd\n  - one\n    two\n  - 汉\t字\n"
        "  got:      x\n            10 rows accepted\\x1b[1m\n  to fix:   look"
    )
    assert error.line() == "a\\nb: is odd (got x\\n10 rows accepted\\x1b[1m)"


def test_usual_text_stays_as_it_is() -> None:
    usual = "a — b, 汉字, \N{FAMILY}\u200d, no-break\u00a0space, C:\\new"
    assert in_one_line(usual) == usual
