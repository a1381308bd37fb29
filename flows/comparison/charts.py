"""Plots as SVG: figures with their intervals. Pure; texts in them are escaped, numbers rounded alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from tasks.html.shell import LIGHT_SERIES
from tasks.reports.statistics import Interval

WIDTH = 360
"""Of every plot, in its own units; a phone shows about one pixel for each."""
_LEFT, _RIGHT = 110, 316
"""Where the axis of a plot of figures begins and ends."""
_STEP = 9
"""Between marks that share a row."""
_LONGEST_NAME = 16


class Mark(NamedTuple):
    """A figure of one model: `series` is the model's number, which its colour and shape are told by."""

    name: str
    series: int
    interval: Interval


class ChartRow(NamedTuple):
    """Marks beside a name; `reference` is drawn behind them."""

    name: str
    marks: Sequence[Mark]
    reference: Interval | None


class Axis(NamedTuple):
    """A stretch of numbers laid evenly from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """Return the coordinate of a value on the axis, rounded to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)


# --- axes -------------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About so many round numbers from at most `low` to at least `high`: multiples of 1, 2 or 5 times a power of ten.

    After Heckbert, "Nice numbers for graph labels", Graphics Gems (1990).
    """
    if high <= low:
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    rough = (high - low) / (wanted - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= rough * 0.75)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [round(number * step, digits) for number in range(first, last + 1)]


# --- figures with intervals -------------------------------------------------------------------------------------------


def span_of(rows: Sequence[ChartRow]) -> tuple[float, float]:
    """Return the least and the greatest of all values that rows show."""
    intervals = [mark.interval for row in rows for mark in row.marks] + [r.reference for r in rows if r.reference]
    return min((each.low for each in intervals), default=0.0), max((each.high for each in intervals), default=1.0)


def whiskers(rows: Sequence[ChartRow], span: tuple[float, float], title: str) -> Markup:
    """Draw dots with whiskers, one row below another, on one axis; references are dashed lines with a band.

    Args:
        rows: a row with one mark shows its figure at the end.
        span: what the axis must hold; plots that shall be compared share one.
        title: what is shown, for readers who do not see.
    """
    ticks = nice_ticks(*span)
    axis = Axis(ticks[0], ticks[-1], _LEFT, _RIGHT)
    heights = [_STEP * len(row.marks) + 12 for row in rows]
    bottom = sum(heights)
    shapes = [_rule(axis.at(tick), 0, bottom) + _text(axis.at(tick), bottom + 13, _short(tick)) for tick in ticks]
    top = 0
    for row, height in zip(rows, heights, strict=True):
        shapes.append(_row(row, axis, top, height))
        top += height
    return _svg(bottom + 18, title, shapes)


def _row(row: ChartRow, axis: Axis, top: int, height: int) -> Markup:
    shown = row.name if len(row.name) <= _LONGEST_NAME else row.name[: _LONGEST_NAME - 1] + "…"
    middle = top + height / 2
    parts = [_text(_LEFT - 8, middle + 4, shown, anchor="end", css="name", hint=row.name)]
    if row.reference:
        low, mean, high = (axis.at(value) for value in (row.reference.low, row.reference.mean, row.reference.high))
        band = Markup('<rect x="{}" y="{}" width="{}" height="{}" class="band"/>')
        parts.append(band.format(low, top + 2, round(high - low, 1), height - 4))
        parts.append(Markup('<path d="M{} {}v{}" class="reference"/>').format(mean, top + 2, height - 4))
    first = middle - _STEP * (len(row.marks) - 1) / 2
    parts += [_mark(mark, axis, first + _STEP * number) for number, mark in enumerate(row.marks)]
    if len(row.marks) == 1:
        value = f"{row.marks[0].interval.mean:.3f}"
        parts.append(_text(WIDTH, middle + 4, value, anchor="end", css="value"))
    return Markup("").join(parts)


def _mark(mark: Mark, axis: Axis, y: float) -> Markup:
    low, mean, high = (axis.at(value) for value in (mark.interval.low, mark.interval.mean, mark.interval.high))
    told = f"{mark.name}: {mark.interval.mean:.3f} [{mark.interval.low:.3f}, {mark.interval.high:.3f}]"
    drawn = Markup('<g class="series-{}"><title>{}</title><path d="M{} {}H{}" class="whisker"/>{}</g>')
    return drawn.format(mark.series % len(LIGHT_SERIES), told, low, y, high, shape(mark.series, mean, y))


def shape(series: int, x: float, y: float) -> Markup:
    """Draw the mark of a model by its number: circle, square, diamond, triangle, in turn."""
    paths = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "m-3.6 -3.6h7.2v7.2h-7.2z",
        "m0 -5l5 5l-5 5l-5 -5z",
        "m0 -4.8l4.8 8.4h-9.6z",
    )
    return Markup('<path d="M{} {}{}" class="mark"/>').format(x, y, paths[series % len(paths)])


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Draw the marks of some models with their names, as a line of HTML."""
    key = Markup('<span class="key series-{}"><svg viewBox="-7 -7 14 14" aria-hidden="true">{}</svg>{}</span>')
    return Markup(" ").join(key.format(series % len(LIGHT_SERIES), shape(series, 0, 0), name) for name, series in names)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _svg(height: float, title: str, shapes: Sequence[Markup]) -> Markup:
    whole = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return whole.format(WIDTH, height, title, Markup("").join(shapes))


def _rule(x: float, top: float, bottom: float) -> Markup:
    return Markup('<path d="M{} {}V{}" class="grid"/>').format(x, top, bottom)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "tick", hint: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(hint) if hint != text and hint else ""
    whole = Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}{}</text>')
    return whole.format(x, y, anchor, css, text, title)


def _short(value: float) -> str:
    """Format a tick's number without needless zeros."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
