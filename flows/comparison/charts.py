"""Plots as SVG: figures with their intervals, and curves. Pure; texts in them are escaped, numbers rounded alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
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
_MOST_POINTS = 200


class Mark(NamedTuple):
    """A figure of one model: `series` is the model's number, which its colour and shape are told by."""

    name: str
    series: int
    interval: Interval


class Row(NamedTuple):
    """Marks beside a name; `reference` is drawn behind them."""

    name: str
    marks: Sequence[Mark]
    reference: Interval | None


class Curve(NamedTuple):
    """Points (x, y) in the order of x; `name` says what they are."""

    name: str
    points: Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """A stretch of numbers laid from `start` to `stop`, evenly or by logarithms."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, to a tenth."""
        place = math.log if self.logarithmic else float
        low, high = place(self.low), place(self.high)
        share = (place(value) - low) / (high - low)
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


def decade_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, from at most `low` to at least `high`, both above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wanted = (1, 2, 5) if len(powers) < 4 else (1,)
    every = [float(f"{nice}e{power}") for power in powers for nice in wanted]
    first = max((tick for tick in every if tick <= low), default=every[0])
    last = min((tick for tick in every if tick >= high), default=every[-1])
    return [tick for tick in every if first <= tick <= last]


def thinned(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Points as they are, or, where there are more than `most`, the means of so many stretches of equal length."""
    if len(points) <= most:
        return list(points)
    edges = [len(points) * part // most for part in range(most + 1)]
    stretches = [points[start:stop] for start, stop in pairwise(edges)]
    return [(math.fsum(x for x, _ in s) / len(s), math.fsum(y for _, y in s) / len(s)) for s in stretches]


# --- figures with intervals -------------------------------------------------------------------------------------------


def span_of(rows: Sequence[Row]) -> tuple[float, float]:
    """The least and the greatest of all that rows show."""
    intervals = [mark.interval for row in rows for mark in row.marks] + [r.reference for r in rows if r.reference]
    return min((each.low for each in intervals), default=0.0), max((each.high for each in intervals), default=1.0)


def whiskers(rows: Sequence[Row], span: tuple[float, float], title: str) -> Markup:
    """Dots with whiskers, one row below another, on one axis; references are dashed lines with a band.

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


def _row(row: Row, axis: Axis, top: int, height: int) -> Markup:
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
    """The mark of a model by its number: circle, square, diamond, triangle, in turn."""
    paths = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "m-3.6 -3.6h7.2v7.2h-7.2z",
        "m0 -5l5 5l-5 5l-5 -5z",
        "m0 -4.8l4.8 8.4h-9.6z",
    )
    return Markup('<path d="M{} {}{}" class="mark"/>').format(x, y, paths[series % len(paths)])


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """The marks of some models with their names, as a line of HTML."""
    key = Markup('<span class="key series-{}"><svg viewBox="-7 -7 14 14" aria-hidden="true">{}</svg>{}</span>')
    return Markup(" ").join(key.format(series % len(LIGHT_SERIES), shape(series, 0, 0), name) for name, series in names)


# --- curves -----------------------------------------------------------------------------------------------------------


def are_steep(several: Sequence[Curve]) -> bool:
    """Whether curves want logarithms: the highest value is ten times the lowest or more, and all are above 0."""
    values = [y for curve in several for _, y in curve.points]
    return bool(values) and 0 < 10 * min(values) <= max(values)


def curves(line: Curve, dots: Curve, series: int, title: str, *, logarithmic: bool) -> Markup:
    """One curve as a line and one as dots that are joined, over the same axes, of which y may be logarithmic."""
    line = line._replace(points=thinned(line.points))
    everything = [*line.points, *dots.points]
    lowest, highest = min(y for _, y in everything), max(y for _, y in everything)
    y_ticks = decade_ticks(lowest, highest) if logarithmic else nice_ticks(lowest, highest)
    x_ticks = [tick for tick in nice_ticks(0, max(x for x, _ in everything), 5) if tick == int(tick)]
    x, y = Axis(0, x_ticks[-1], 40, WIDTH - 14), Axis(y_ticks[0], y_ticks[-1], 170, 10, logarithmic)
    shapes = []
    for tick in y_ticks:
        across = Markup('<path d="M40 {}H{}" class="grid"/>').format(y.at(tick), WIDTH - 14)
        shapes.append(across + _text(34, y.at(tick) + 4, _short(tick), anchor="end"))
    shapes += [_text(x.at(tick), 186, f"{tick:,.0f}") for tick in x_ticks]
    for curve, css in ((line, "line"), (dots, "joined")):
        path = " ".join(f"{x.at(step)},{y.at(value)}" for step, value in curve.points)
        named = Markup('<polyline points="{}" class="{}"><title>{}</title></polyline>')
        shapes.append(named.format(path, css, curve.name))
    shapes += [
        Markup('<circle cx="{}" cy="{}" r="3.4" class="mark"><title>{}</title></circle>').format(
            x.at(step), y.at(value), f"{dots.name}, step {step:,.0f}: {value:.3f}"
        )
        for step, value in dots.points
    ]
    inner = Markup('<g class="series-{}">{}</g>').format(series % len(LIGHT_SERIES), Markup("").join(shapes))
    return _svg(194, title, [inner])


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
    """A tick's number without needless noughts."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


STYLE = (
    "".join(f".series-{number} {{ --colour: var(--series-{number}) }}\n" for number in range(len(LIGHT_SERIES)))
    + """
.grid { stroke: var(--line); fill: none } .whisker { stroke: var(--colour); stroke-width: 2; fill: none }
.mark { fill: var(--colour); stroke: var(--panel); stroke-width: 1 }
.reference { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3; fill: none }
.band { fill: var(--soft); opacity: .16 }
.line { stroke: var(--colour); opacity: .5; fill: none; stroke-width: 1.3 }
.joined { stroke: var(--colour); fill: none; stroke-width: 2 }
svg text.name, svg text.value { fill: var(--ink) } svg text.value { font-variant-numeric: tabular-nums }
.key { display: inline-flex; align-items: center; vertical-align: middle; gap: .3rem; margin-right: 1rem }
.key svg { width: 1rem }
"""
)
"""The CSS of the shapes above; `series-N` gives what stands within it the colour of a model."""
