"""Keys that may stand at a place of a params file: a walk through the types of its sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def fields_at(kind: Any, place: Sequence[str], value: Any) -> dict[str, FieldInfo]:
    """Return the fields of the section that stands at a place, by their keys; none where no section stands.

    Args:
        kind: the type of the whole: a `Section`, or anything that is made of some.
        place: the keys that lead to the section.
        value: of the whole; what it says tells alternatives of a section apart (by `kind` or `name`).
    """
    kinds = [kind]
    for key in place:
        kinds = [inner for each in kinds for inner in _inside(each, key, value)]
        value = _step(value, key)
    return {
        field.alias or name: field
        for each in kinds
        for section in _sections(each, value)
        for name, field in section.model_fields.items()
    }


def _step(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return value[int(key)] if key.isdigit() and int(key) < len(value) else None
    return value.get(key) if isinstance(value, Mapping) else None


def _alternatives(kind: Any) -> Iterator[Any]:
    """Return the parts of a union, without what annotates them."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from _alternatives(part)
    else:
        yield kind


def _sections(kind: Any, value: Any) -> Iterator[type[BaseModel]]:
    for part in _alternatives(kind):
        if isinstance(part, type) and issubclass(part, BaseModel) and _is_meant(part, value):
            yield part


def _is_meant(section: type[BaseModel], value: Any) -> bool:
    """Return whether the `kind` or `name` that a value gives, if any, is one of this section's."""
    if not isinstance(value, Mapping):
        return True
    for key in ("kind", "name"):
        field = section.model_fields.get(key)
        if field and get_origin(field.annotation) is Literal and key in value:
            return value[key] in get_args(field.annotation)
    return True


def _inside(kind: Any, key: str, value: Any) -> Iterator[Any]:
    for part in _alternatives(kind):
        if get_origin(part) is dict:
            yield get_args(part)[1]
        elif get_origin(part) is list:
            yield get_args(part)[0]
    for section in _sections(kind, value):
        for name, field in section.model_fields.items():
            if key == (field.alias or name):
                yield field.annotation
