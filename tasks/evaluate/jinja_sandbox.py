"""Jinja templates that came with data: run in the immutable sandbox, in a process with little time and little room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.core.errors import BadData
from tasks.core.limited_process import FAILURES, REFUSED, WORKER, Failure, Result

_RENDERER = "tasks.evaluate.jinja_worker:task_renderer"


def render_template(template: str, values: Mapping[str, Any], where: str) -> str:
    """Render a template with some values.

    Raises:
        BadData: it is no template, names a value that does not exist, takes too long or too much memory, or leaves the
            sandbox.
    """
    made = _render(template, values)
    if isinstance(made, Result):
        return made.text
    if made.kind != REFUSED:
        raise BadData(f"the template {FAILURES[made.kind]}", where=where, got=made.text, fix="correct it")
    raise BadData("the template cannot be used", where=where, got=f"{made.error}: {made.text}", fix="correct it")


def _render(template: str, values: Mapping[str, Any]) -> Result | Failure:
    (made,) = WORKER.map(_RENDERER, template, [values])
    return made


class Template(NamedTuple):
    """What lm-eval takes for a template of Jinja's."""

    source: str

    def render(self, **values: Any) -> str:
        """Render it.

        Raises:
            BadData: it takes too long or too much memory.
            TemplateError: it is refused.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        made = _render(self.source, values)
        if isinstance(made, Result):
            return made.text
        if made.kind != REFUSED:
            raise BadData(f"the template {FAILURES[made.kind]}", where=self.source[:80], got=made.text)
        raise (SecurityError if made.error == SecurityError.__name__ else TemplateError)(f"{made.error}: {made.text}")


class Environment:
    """What lm-eval takes for an environment of Jinja's."""

    def from_string(self, source: str) -> Template:
        """Return a template, which is compiled where it is rendered."""
        return Template(source)
