"""Templates of tasks as the worker of `tasks/core/limited_process.py` renders them: in the immutable sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment


@lru_cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of all such templates, with lm-eval's one filter."""
    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lambda text, pattern, to, count=0: re.sub(pattern, to, text, count=count)
    return sandbox


def task_renderer(template: str) -> Callable[[Mapping[str, Any]], str]:
    """Compile a template of a task; return what renders it with values."""
    compiled = environment().from_string(template)
    return lambda values: compiled.render(**values)
