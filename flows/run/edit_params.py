"""Changing params.yaml from the command line: visibly, with its comments, and only to something valid."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core import pipeline
from tasks.core.artifacts import atomic_write
from tasks.core.errors import BadParams, did_you_mean
from tasks.core.params_file import SHARED, effective, read_yaml, stands
from tasks.core.params_tree import fields_at
from tasks.orchestration.params import Params, check
from tasks.train.params import Method

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


def change_params(workspace: Path, recipe: Path | None, settings: Sequence[str]) -> str:
    """Replace params.yaml by a recipe and set single values, then write it.

    Args:
        workspace: the folder with params.yaml.
        recipe: a params file to start from; without it the present one.
        settings: `dotted.key=value`, the value in YAML.

    Returns:
        The difference, in unified form; empty when nothing changed.

    Raises:
        BadParams: a setting names no key that params.yaml may have, or the result is not valid or names a path where
            there is nothing; then nothing was written.
    """
    path = workspace / pipeline.PARAMS
    content = read_yaml(recipe or path)
    for setting in settings:
        _apply(content, setting)
    check(content, str(recipe or path) + (" with --set" if settings else ""))
    pipeline.check_sources(workspace, pipeline.load(workspace, content))
    text = dump(content) if settings else (recipe or path).read_text(encoding="utf-8")
    return replace_params(path, text.replace("$schema=../", "$schema=", 1) if recipe else text)  # seen from here


def replace_params(path: Path, new: str) -> str:
    """Write params.yaml, keep what it was as params.yaml.before, and return the difference; none if nothing changed."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if new == old:
        return ""
    if old:
        shutil.copyfile(path, path.with_name("params.yaml.before"))
    atomic_write(path, new)
    return "".join(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), "params.yaml before", "params.yaml")
    )


def _apply(content: Any, setting: str) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    dotted, equals, text = setting.partition("=")
    if not equals:
        raise BadParams(
            "is not a setting", where=f"--set {setting}", expected="dotted.key=value, such as train.qlora.epochs=2"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise BadParams("its value is not YAML", where=f"--set {setting}", got=str(error).split("\n")[0]) from error
    *parents, last = dotted.split(".")
    node = content
    for depth, key in enumerate([*parents, last]):
        above = tuple(parents[:depth])
        known = dict.fromkeys([*node, *_known(above, content)]) if isinstance(node, dict) else {}
        if key not in known:
            raise BadParams(
                f'has no key "{key}"{did_you_mean(key, list(known))}',
                where="--set " + ".".join([*parents, last][: depth + 1]),
                expected=", ".join(known),
            )
        if depth == len(parents):
            _put(node, key, value)
        elif node.get(key) is None:
            _put(node, key, _begun((*above, key), content))
        node = node[key]


def _known(place: tuple[str, ...], content: Any) -> dict[str, FieldInfo]:
    """Return the keys that may stand in a section, whether or not they do."""
    values = effective(content)
    whole, below = (Method, place[1:]) if place[:1] == (SHARED,) else (Params, place)
    return fields_at(whole, below, values[SHARED] if whole is Method else values)


def _begun(place: tuple[str, ...], content: Any) -> Any:
    """Return a section that is to be written down: empty, or with the `name` that it has by default."""
    from ruamel.yaml.comments import CommentedMap

    section = CommentedMap()
    field = _known(place[:-1], content).get(place[-1])
    default = field.get_default(call_default_factory=False) if field else None
    if (name := getattr(default, "name", None)) and not stands(place, effective(content)):
        section["name"] = name
    return section


def _put(node: Any, key: str, value: Any) -> None:
    """Set a value. A new key comes first: after the last one stand the comments of what follows."""
    if key in node:
        node[key] = value
    else:
        node.insert(0, key, value)


def dump(content: Any) -> str:
    """Return a params file's text, with its comments."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    out = StringIO()
    yaml.dump(content, out)
    return out.getvalue()
