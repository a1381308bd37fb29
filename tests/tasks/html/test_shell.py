from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tasks.html.shell import DARK, DARK_SERIES, LIGHT, LIGHT_SERIES, html_page, palette, visible


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # WCAG's own example of just too little


@pytest.mark.parametrize(("named", "series"), [(LIGHT, LIGHT_SERIES), (DARK, DARK_SERIES)])
def test_everything_that_says_something_can_be_read(named: Mapping[str, str], series: tuple[str, ...]) -> None:
    """4.5:1 is what WCAG asks of text (level AA); marks and lines need 3:1, ours do as well as text."""
    for behind in ("paper", "panel"):
        for colour in (*(named[name] for name in ("ink", "soft", "bar", "good", "bad")), *series):
            assert contrast(colour, named[behind]) >= 4.5, (colour, behind)


@pytest.mark.parametrize("colours", [palette(LIGHT, LIGHT_SERIES), palette(DARK, DARK_SERIES)])
def test_every_colour_is_a_variable_of_the_style(tmp_path: Path, colours: Mapping[str, str]) -> None:
    made = html_page(write_template(tmp_path), {})
    for name, colour in colours.items():
        assert f"--{name}: {colour};" in made
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", made)) <= colours.keys()


def test_light_and_dark_have_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(LIGHT_SERIES) == len(DARK_SERIES)


def write_template(folder: Path) -> Path:
    template = folder / "said.html.jinja"
    template.write_text(
        '{% extends "page.html.jinja" %}{% block title %}{{ title }}{% endblock %}'
        "{% block body %}<p>{{ said }}</p>{% endblock %}"
    )
    return template


def test_what_a_page_is_filled_with_is_text(tmp_path: Path) -> None:
    made = html_page(write_template(tmp_path), {"title": "a & b", "said": "</p><script>alert(1)</script>"})
    assert "<title>a &amp; b</title>" in made
    assert "<p>&lt;/p&gt;&lt;script&gt;alert(1)&lt;/script&gt;</p>" in made
    assert "default-src &#39;none&#39;" in made  # and no browser would run it
    assert "prefers-color-scheme: dark" in made


def test_what_is_invisible_or_turns_text_around_is_made_visible(tmp_path: Path) -> None:
    assert visible("a\x00b\x1b[31mc\x7f\u202ed\u200be\ufeff\r\x85\ue000") == (
        "a␀b␛[31mc␡⟨U+202E⟩d⟨U+200B⟩e⟨U+FEFF⟩␍⟨U+0085⟩⟨U+E000⟩"
    )
    plain = "two\nlines\tand 👩\u200d🔬 中文 नमस्ते é"
    assert visible(plain) == plain
    assert "\x07" not in html_page(write_template(tmp_path), {"said": "ding\x07"})
