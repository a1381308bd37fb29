"""What temper's pages have in common: colours for light and dark, type, tables. They need nothing beside them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

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

_STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 74rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem }
h3 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600 }
.cards { display: flex; flex-wrap: wrap; gap: .8rem } .card { border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; min-width: 7rem } .card b { display: block; font-size: 1.5rem; font-weight: 600 }
.card span, .note, td.soft, .soft { color: var(--soft) } .note { max-width: 60rem }
table { border-collapse: collapse; width: 100% } .wide { overflow-x: auto } .wide th { white-space: nowrap }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.6rem;
  align-items: start }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.bar { fill: var(--bar) } .good { color: var(--good) } .bad { color: var(--bad) } code { font-size: .9em }
"""

_PLAIN = "\n\t\u200c\u200d"

_SKELETON = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>{{ style }}</style></head><body>
{{ body }}
</body></html>
"""


def html_page(title: str, body: str, values: Mapping[str, Any], *, style: str = "") -> str:
    """A whole HTML page.

    Args:
        title: of the window.
        body: a Jinja template of what the page holds; numbers have the filter `thousands`.
        values: what the template is filled with; all but `Markup` is escaped, and no character stays invisible.
        style: CSS beside that of all pages.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = "{:,}".format
    filled = Markup(environment.from_string(body).render(values))  # noqa: S704 - it was escaped as it was filled
    skeleton = environment.from_string(_SKELETON)
    return visible(
        skeleton.render(title=title, policy=_POLICY, style=Markup(_colours() + _STYLE + style), body=filled)  # noqa: S704
    )


def visible(text: str) -> str:
    """A text whose control characters are shown as their pictures, and marks of direction and the like by number.

    Lines, tabs and what joins letters stay: of anything else a reader could not tell that it is there.
    """
    hidden = [c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in _PLAIN]
    return text.translate({ord(character): _picture(ord(character)) for character in hidden})


def _picture(number: int) -> str:
    return chr(0x2400 + number) if number < 0x20 else "\u2421" if number == 0x7F else f"\u27e8U+{number:04X}\u27e9"


def _colours() -> str:
    """The colours as CSS variables: light ones, and dark ones where the reader asks for them."""
    light, dark = (
        " ".join(f"--{name}: {value};" for name, value in {**named, **_numbered(series)}.items())
        for named, series in ((LIGHT, LIGHT_SERIES), (DARK, DARK_SERIES))
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _numbered(series: tuple[str, ...]) -> dict[str, str]:
    return {f"series-{number}": colour for number, colour in enumerate(series)}
