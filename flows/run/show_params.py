"""Values of every param with their origins, and the migration of an old file to the present words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flows.run.edit_params import dump, replace_params
from tasks.core import pipeline
from tasks.core.artifacts import atomic_write
from tasks.core.params_file import METHODS, SHARED, line_of, origin, read_yaml, stands
from tasks.orchestration.params import check, json_schema
from tasks.orchestration.params_migration import Outdated, migrate

SCHEMA = "params.schema.json"


class Resolved(NamedTuple):
    """A value with its dotted key and where it comes from: `default`, or a line of the file."""

    key: str
    value: Any
    origin: str


def resolved(workspace: Path) -> list[Resolved]:
    """Return every value of the workspace's params.

    Raises:
        BadParams: the file cannot be read, or keys are wrong.
    """
    path = workspace / pipeline.PARAMS
    content = read_yaml(path)
    values = check(content, str(path)).model_dump(by_alias=True, exclude={SHARED})
    return [Resolved(".".join(place), value, _origin(place, content)) for place, value in _leaves((), values)]


def _origin(place: tuple[str, ...], content: Mapping[str, Any]) -> str:
    at = origin(place, content)
    if not stands(at, content):
        return "default"
    shared = f"{SHARED}, " if place[0] == METHODS and at[0] == SHARED else ""
    return f"{shared}{pipeline.PARAMS}:{line_of(at, content)}"


def _leaves(above: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves((*above, key), inner)
    else:
        yield above, value


def write_schema(workspace: Path) -> Path:
    """Write the JSON schema of params.yaml beside it, for editors."""
    path = workspace / SCHEMA
    atomic_write(path, schema_text())
    return path


def schema_text() -> str:
    """Return the JSON schema as it is shipped."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def migrate_params(workspace: Path) -> tuple[list[Outdated], str]:
    """Rewrite an old params.yaml in the present words; comments and order stay, the old file is kept beside it.

    Returns:
        What was renamed, and the difference in unified form.

    Raises:
        BadParams: the file cannot be read, or other keys are wrong; then nothing was written.
    """
    path = workspace / pipeline.PARAMS
    content = read_yaml(path)
    renamed = migrate(content)
    check(content, str(path))
    return renamed, replace_params(path, dump(content))
