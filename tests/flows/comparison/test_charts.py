from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from flows.comparison.charts import WIDTH, Axis, ChartRow, Mark, legend, nice_ticks, span_of, whiskers
from tasks.reports.statistics import Interval

SVG = {"aria-label": "t", "role": "img"}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.03, 0.97, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.82, 0.88, [0.82, 0.84, 0.86, 0.88]),
        (-3, 41, [-10, 0, 10, 20, 30, 40, 50]),
        (0, 300, [0, 100, 200, 300]),
        (0.5, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),  # one number is seen from 0
        (-2, -2, [-2, -1.5, -1, -0.5, 0]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_everything(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert found == ticks


def test_places_on_an_axis() -> None:
    assert [Axis(0, 2, 100, 300).at(value) for value in (0, 0.5, 2)] == [100, 150, 300]


def test_dots_whiskers_and_the_base_lie_where_their_numbers_are() -> None:
    """The axis goes from 110 to 316 for 0 to 1: so 0.5 lies at 213, 0.2 at 151.2, 0.8 at 274.8."""
    row = ChartRow("qlora", [Mark("qlora", 0, Interval(0.5, 0.2, 0.8))], Interval(0.1, 0.0, 0.2))
    drawn = ET.fromstring(whiskers([row], (0.0, 1.0), "t"))
    assert drawn.attrib == {"viewBox": f"0 0 {WIDTH} 39", **SVG}
    paths = {path.get("class"): path.get("d", "") for path in drawn.iter("path")}
    assert paths["whisker"] == "M151.2 10.5H274.8"
    assert paths["mark"].startswith("M213.0 10.5")
    assert paths["reference"].startswith("M130.6 ")
    band = next(drawn.iter("rect"))
    assert (band.get("x"), band.get("width")) == ("110.0", "41.2")
    texts = [text.text for text in drawn.iter("text")]
    assert texts == ["0", "0.2", "0.4", "0.6", "0.8", "1", "qlora", "0.500"]


def test_plots_that_shall_be_compared_share_what_their_axes_hold() -> None:
    rows = [ChartRow("a", [Mark("m", 0, Interval(0.5, 0.4, 0.6))], Interval(0.2, 0.1, 0.3)), ChartRow("b", [], None)]
    assert span_of(rows) == (0.1, 0.6)
    assert span_of([]) == (0.0, 1.0)


def test_names_are_text_and_long_ones_are_cut_with_the_whole_as_a_hint() -> None:
    name = "<script>alert('a very long name')</script>"
    row = ChartRow(name, [Mark(name, 7, Interval(0.5, 0.4, 0.6))], None)
    made = whiskers([row], (0, 1), name) + legend([(name, 7)])
    assert "<script" not in made
    drawn = ET.fromstring(whiskers([row], (0, 1), name))
    text = next(text for text in drawn.iter("text") if text.get("class") == "name")
    assert text.text == "<script>alert('…"
    assert text.findtext("title") == name
