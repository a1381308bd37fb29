"""Jinja templates that came with data: run in the immutable sandbox, with little time and little room."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.core.errors import BadData

if TYPE_CHECKING:
    from jinja2 import Environment

SECONDS = 2.0
"""How long a template may take for one question."""

MOST_CHARACTERS = 1 << 22
"""A text or list that a template makes by repeating one may get so long."""


def render_template(template: str, values: Mapping[str, Any], where: str) -> str:
    """Render a template with some values.

    Raises:
        BadData: it is no template, names a value that does not exist, does not end, or leaves the sandbox.
    """
    from jinja2 import TemplateError

    try:
        return str(environment().from_string(template).render(**values))
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise BadData(
            "the template cannot be used", where=where, got=f"{type(error).__name__}: {error}", fix="correct it"
        ) from error


@lru_cache
def environment() -> Environment:
    """Return the environment of all such templates, with lm-eval's one filter."""
    import re

    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from tasks.core.signals import limited

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and abs(right) > 64:
                raise SecurityError("raises to too high a power")
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if operator == "*" and hasattr(sized, "__len__") and len(sized) * times > MOST_CHARACTERS:
                raise SecurityError("makes too long a text")
            return super().call_binop(context, operator, left, right)

        def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
            template: Any = super().from_string(source, *args, **kwargs)
            render = template.render

            def in_time(*values: Any, **named: Any) -> str:
                with limited(SECONDS, "the template"):
                    return str(render(*values, **named))

            template.render = in_time
            return template

    sandbox = Sandbox(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lambda text, pattern, to, count=0: re.sub(pattern, to, text, count=count)
    return sandbox
