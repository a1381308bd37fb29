"""Changing params.yaml from the command line: visibly, with its comments, and only to something valid."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from tasks.core import pipeline
from tasks.core.artifacts import atomic_write
from tasks.core.errors import BadParams, did_you_mean
from tasks.core.params_file import read_yaml
from tasks.orchestration.params import check


def change_params(workspace: Path, recipe: Path | None, settings: Sequence[str]) -> str:
    """Replace params.yaml by a recipe and set single values, then write it.

    Args:
        workspace: the folder with params.yaml.
        recipe: a params file to start from; without it the present one.
        settings: `dotted.key=value`, the value in YAML.

    Returns:
        The difference, in unified form; empty when nothing changed.

    Raises:
        BadParams: a setting names no key, or the result is not valid or names a path where there is nothing; then
            nothing was written.
    """
    path = workspace / pipeline.PARAMS
    content = read_yaml(recipe or path)
    for setting in settings:
        _apply(content, setting)
    check(content, str(recipe or path) + (" with --set" if settings else ""))
    pipeline.check_sources(workspace, pipeline.load(workspace, content))
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    new = _dump(content) if settings else (recipe or path).read_text(encoding="utf-8")
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
    for place, key in enumerate([*parents, last]):
        if not isinstance(node, dict) or key not in node:
            known = list(node) if isinstance(node, dict) else []
            raise BadParams(
                f'has no key "{key}"{did_you_mean(key, known)}',
                where="--set " + ".".join([*parents, last][: place + 1]),
                expected=", ".join(known),
            )
        if place < len(parents):
            node = node[key]
    node[last] = value


def _dump(content: Any) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    out = StringIO()
    yaml.dump(content, out)
    return out.getvalue()
