"""Common parts of temper's pages: colours for light and dark, type, tables. Each page is self-contained."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f6f8fa",
    "ink": "#1c2430",
    "soft": "#566170",
    "line": "#dde3ea",
    "bar": "#3b6fb5",
    "good": "#1f6f45",
    "bad": "#a8322c",
}
DARK: Mapping[str, str] = {
    "paper": "#12161c",
    "panel": "#1a2028",
    "ink": "#e7ebf0",
    "soft": "#a3afbd",
    "line": "#313a46",
    "bar": "#6ea3e6",
    "good": "#67c795",
    "bad": "#f08d85",
}
"""Colours by what they are for; those that say something stand apart from `paper` and `panel` as WCAG asks (4.5:1)."""

LIGHT_SERIES = ("#2b66b1", "#b84a08", "#1f7a4d", "#7a48b5", "#a82a66", "#0b6f80")
DARK_SERIES = ("#7db4f7", "#f2a05e", "#69cc99", "#c2a2f2", "#f191bd", "#5fc9da")
"""Colours that tell things of one kind apart, in their order; what they mean is always written beside them, too."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do with a page: no scripts, nothing fetched, whatever stands in it."""

_PLAIN = "\n\t\u200c\u200d"

_FOLDER = Path(__file__).parent
"""Where page.html.jinja and page.css.jinja stand, which every page extends."""


def environment(*folders: Path) -> Environment:
    """Return what renders templates of some folders, of which earlier ones come first, and of the shell's own.

    All but `Markup` is escaped. Numbers have the filter `thousands`; `light` and `dark` are the palettes.
    """
    from jinja2 import Environment, FileSystemLoader

    made = Environment(
        loader=FileSystemLoader([*folders, _FOLDER]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["thousands"] = "{:,}".format
    made.globals |= {"policy": _POLICY, "light": palette(LIGHT, LIGHT_SERIES), "dark": palette(DARK, DARK_SERIES)}
    return made


def html_page(template: Path, values: Mapping[str, Any]) -> str:
    """Render a whole HTML page.

    Args:
        template: a Jinja template that extends page.html.jinja; what it includes stands beside it.
        values: what it is filled with; no character stays invisible.
    """
    return visible(environment(template.parent).get_template(template.name).render(values))


def palette(named: Mapping[str, str], series: Sequence[str]) -> dict[str, str]:
    """Return the CSS variables of a set of colours; those of `series` are called series-0, series-1, ..."""
    return {**named, **{f"series-{number}": colour for number, colour in enumerate(series)}}


def visible(text: str) -> str:
    """Show a text's control characters as their pictures, and marks of direction and the like by number.

    Lines, tabs and what joins letters stay: a reader could not see that anything else is there.
    """
    hidden = [c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in _PLAIN]
    return text.translate({ord(character): _picture(ord(character)) for character in hidden})


def _picture(number: int) -> str:
    return chr(0x2400 + number) if number < 0x20 else "\u2421" if number == 0x7F else f"\u27e8U+{number:04X}\u27e9"
