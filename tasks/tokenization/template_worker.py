"""Chat templates as the worker of `tasks/core/limited_process.py` renders them: what transformers makes of them.

The environment is that of transformers' `apply_chat_template` line for line (5.23), without importing transformers:
a worker starts in a tenth of a second. A test holds both side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class AssistantTracker(jinja2.ext.Extension):
    """Keeps where the `{% generation %}` parts of a text are."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def __init__(self, environment: jinja2.Environment) -> None:
        """Give the environment what turns this on."""
        super().__init__(environment)
        environment.extend(activate_tracker=self.activate)
        self._blocks: list[str] | None = None
        self._marks: list[tuple[int, int]] | None = None

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse what stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _generation_support(self, context: jinja2.nodes.EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        if self._blocks is not None and self._marks is not None:
            start = len("".join(self._blocks))
            self._marks.append((start, start + len(text)))
        return text

    @contextmanager
    def activate(self, blocks: list[str], marks: list[tuple[int, int]]) -> Iterator[None]:
        """Keep the marks of what is rendered within this block."""
        self._blocks, self._marks = blocks, marks
        try:
            yield
        finally:
            self._blocks = self._marks = None


class _Dict:
    """Stands for `dict`, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(
                f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
                "Please rename the attribute."
            )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:  # noqa: A002  # templates may call it by this name
    return datetime.now().strftime(format)  # as transformers has it; dated templates have none


_OF_DICTS = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which finds `message.role` at once: a plain dict has no attributes but those of its class."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


@lru_cache(8)
def compiled(source: str) -> jinja2.Template:
    """Compile a chat template, in an environment of its own."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[AssistantTracker, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def chat_renderer(common: tuple[str, Mapping[str, Any], bool]) -> Callable[[tuple[Sequence[Any], Any]], Any]:
    """Compile a chat template.

    Args:
        common: its source, what it is given beside messages and tools, and whether its `{% generation %}` parts are
            wanted.

    Returns:
        A function that renders messages with tools: their text, and the parts' places if they are wanted.
    """
    source, given, marked = common
    template = compiled(source)

    def render_marked(row: tuple[Sequence[Any], Any]) -> tuple[str, list[tuple[int, int]]]:
        blocks, marks = list[str](), list[tuple[int, int]]()
        with template.environment.activate_tracker(blocks, marks):  # type: ignore[attr-defined]  # the extension's
            for block in template.generate(messages=row[0], tools=row[1], documents=None, **given):
                blocks.append(block)  # the extension reads what there is so far
        return "".join(blocks), marks

    def render(row: tuple[Sequence[Any], Any]) -> str:
        return template.render(messages=row[0], tools=row[1], documents=None, **given)

    return render_marked if marked else render
