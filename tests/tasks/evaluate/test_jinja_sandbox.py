from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import BadData
from tasks.evaluate.jinja_sandbox import render_template
from tasks.evaluate.lm_eval_tasks import confined

HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{{ lipsum.__globals__['os'].popen('touch PWNED').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ('%c' * 5) | attr('format') }}{{ x.__init__ }}",
    "{{ x.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 'a' * 10**9 }}",
    "{{ 2 ** 100000 }}",
    "{{ missing }}",
    "{{ x[7] }}",
    "{% for %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_or_broken_template_is_refused(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData):
        render_template(template, {"x": [1]}, "here")
    assert not list(tmp_path.iterdir())


def test_what_templates_are_for_works() -> None:
    template = "{% for c in choices %}{{ letters[loop.index0] }}. {{ c | trim }}\n{% endfor %}{{ '-' * 3 }}"
    assert render_template(template, {"choices": [" x", "y"], "letters": "AB"}, "") == "A. x\nB. y\n---"
    assert render_template("{{ x | regex_replace('[0-9]+', '#') }}\n", {"x": "a1b22"}, "") == "a#b#\n"


def test_lm_eval_renders_in_the_sandbox_for_the_time_of_a_call_only() -> None:
    """Outside, lm-eval itself runs what it is given; inside, it does not."""
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    escape = "{{ ''.__class__.__mro__ | length }}"
    assert utils.apply_template(escape, {}) == "2"
    with confined(lambda *_, **__: None), pytest.raises(SecurityError):
        utils.apply_template(escape, {})
    assert utils.apply_template(escape, {}) == "2"
