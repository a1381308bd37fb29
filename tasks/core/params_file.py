"""Read and check a params file: plain YAML, every wrong key named at once, each with its line and its dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from tasks.core.errors import BadParams
from tasks.core.params_tree import fields_at

METHODS, SHARED = "train", "train_defaults"
"""The sections with the methods, and with the values that they share."""


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read the file's content with line numbers and comments kept (a ruamel round-trip mapping).

    Raises:
        BadParams: the file is missing, too large, or not plain YAML without tags, aliases and repeated keys.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        for event in YAML(typ="safe", pure=True).parse(text):
            _refuse_tricks(event, path)
        content = YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise BadParams(
            "is not valid YAML", where=where, got=(error.problem or str(error)).strip(), fix="correct this line"
        ) from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise BadParams("cannot be read", where=str(path), got=str(error), expected="a YAML file in UTF-8") from error
    if not isinstance(content, Mapping):
        raise BadParams(
            "holds no sections", where=str(path), expected="a mapping", fix="start from recipes/quickstart.yaml"
        )
    return content


def _refuse_tricks(event: Any, path: Path) -> None:
    """Refuse YAML tags and aliases: a tag could run code, and a few aliases of aliases could take all memory."""
    from ruamel.yaml.events import AliasEvent

    trick = "alias" if isinstance(event, AliasEvent) else "tag" if getattr(event, "ctag", None) else ""
    if trick:
        where = f"{path}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
        raise BadParams(
            f"a YAML {trick} is not allowed here", where=where, expected="a plain value", fix="write it out"
        )


def effective(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a file means: every method of `train` laid over `train_defaults`; an empty section is {}.

    A method's own value wins. Of `adapter` and `objective` single keys are laid over where both have the same `name`,
    or the method gives none; everything else is taken whole.
    """
    values = {key: {} if value is None else value for key, value in plain(content).items()}
    shared, methods = values.get(SHARED, {}), values.get(METHODS)
    if isinstance(shared, dict) and isinstance(methods, dict):
        values[METHODS] = {name: _laid_over(shared, {} if own is None else own) for name, own in methods.items()}
    return values


def _laid_over(shared: dict[str, Any], own: Any) -> Any:
    if not isinstance(own, dict):
        return own
    values = shared | own
    for key in {"adapter", "objective"} & shared.keys() & own.keys():
        below, above = shared[key], own[key]
        if (
            isinstance(below, dict)
            and isinstance(above, dict)
            and above.get("name", below.get("name")) == below.get("name")
        ):
            values[key] = below | above
    return values


def origin(place: tuple[str, ...], content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return where a value of a method really stands: at its own place, or at that of `train_defaults`."""
    below = (SHARED, *place[2:])
    return (
        below
        if place[:1] == (METHODS,) and len(place) > 2 and stands(below, content) and not stands(place, content)
        else place
    )


def stands(place: tuple[str, ...], content: Any) -> bool:
    """Return whether something stands at a place."""
    for key in place:
        if isinstance(content, list) and key.isdigit() and int(key) < len(content):
            content = content[int(key)]
        elif isinstance(content, Mapping) and key in content:
            content = content[key]
        else:
            return False
    return True


def validated(kind: Any, content: Mapping[str, Any], where: str, place: tuple[str, ...] = ()) -> Any:
    """Check what stands at a place of a params file, and return it typed.

    Args:
        kind: the type it must have: a `Section`, or anything that pydantic knows.
        content: of the whole file.
        where: names the file in errors.
        place: the keys that lead to it; none for the whole file. A section may be left out, what is in it may not.

    Raises:
        BadParams: one or more keys are wrong or missing; all of them are named, each with its line.
    """
    values = effective(content)
    if len(place) == 1:
        values.setdefault(place[0], {})
    for depth in range(len(place)):
        if not stands(place[: depth + 1], values):
            missing = place[: depth + 1]
            raise wrong_keys([f"line {line_of(missing, content)}: {'.'.join(missing)}: is missing"], where)
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(_at(place, values))
    except ValidationError as error:
        errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        told = _problems(errors, values, adapter, kind, place)
        lines = {(origin(at, content), text) for at, text in told.items()}
        raise wrong_keys(
            [f"line {line_of(at, content)}: {'.'.join(at)}: {text}" for at, text in sorted(lines)], where
        ) from error


def wrong_keys(problems: Sequence[str], where: str) -> BadParams:
    """Return the error that names every wrong key of a file."""
    return BadParams(
        f"{len(problems)} {'key is' if len(problems) == 1 else 'keys are'} wrong",
        where=where,
        examples=problems,
        fix="docs/params.md has every key; `temper params` shows what each is now",
    )


def plain(value: Any) -> Any:
    """YAML nodes as the builtin types that strict validation wants."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    for builtin in (bool, int, float, str):
        if isinstance(value, builtin):
            return builtin(value)
    return value


def _problems(
    errors: list[ErrorDetails], content: Mapping[str, Any], adapter: TypeAdapter[Any], kind: Any, above: tuple[str, ...]
) -> dict[tuple[str, ...], str]:
    """Say what is wrong at each place. An unknown key that is like a known one that is absent is a misspelling.

    Args:
        errors: pydantic's, of what stands at `above`.
        content: the values of the whole file.
        adapter: what checked it.
        kind: the type it was made of.
        above: the keys that lead to what was checked.
    """
    places = [_place((*above, *error["loc"]), content, missing=error["type"] == "missing") for error in errors]
    missing = {place for place, error in zip(places, errors, strict=True) if error["type"] == "missing"}
    unknown = {place for place, error in zip(places, errors, strict=True) if error["type"] == "extra_forbidden"}
    lines: dict[tuple[str, ...], str] = {}
    for place, error in zip(places, errors, strict=True):
        if error["type"] == "extra_forbidden":
            section = _at(place[:-1], content)
            known = fields_at(kind, place[len(above) : -1], _at(above, content)).keys()
            if near := _nearest(place[-1], known - section.keys()):
                lines[place] = f'unknown key; did you mean "{near}"?'
                missing.discard((*place[:-1], near))
            else:
                near = _nearest(place[-1], [key for key in section if (*place[:-1], key) not in unknown])
                lines[place] = "unknown key" + (
                    f'; the nearest known one is "{near}", which is given too' if near else ""
                )
        elif error["type"] == "union_tag_not_found":
            key = _tag(error)
            lines[*place, key] = f"is missing; one of: {', '.join(_names(place, key, content, adapter, above))}"
        elif error["type"] == "union_tag_invalid":
            names, got = _expected(error), error["ctx"]["tag"]
            near = _nearest(got, names)
            meant = f'did you mean "{near}"? One of' if near else "one of"
            lines[*place, _tag(error)] = f"is unknown; got {got!r}; {meant}: {', '.join(names)}"
        elif error["type"] != "missing":
            shown = error["input"] if not isinstance(error["input"], (dict, list)) else "a mapping or list"
            # of a key that may be one thing or another, what is wrong with each
            before = f"{lines[place].rpartition('; got ')[0]}, or: " if place in lines else ""
            lines[place] = f"{before}{error['msg']}; got {shown!r}"
    lines |= dict.fromkeys(missing, "is missing")
    # what is wrong inside says more than that the whole is not the other thing it could be
    inner = {place[:n] for place in lines for n in range(len(place))}
    return {place: text for place, text in lines.items() if place not in inner}


def _nearest(key: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(key, list(known), n=1, cutoff=0.6)), None)


def _tag(error: ErrorDetails) -> str:
    """Return the key that names the alternative of a section, such as `name`."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _expected(error: ErrorDetails) -> list[str]:
    return [name.strip("'") for name in error["ctx"]["expected_tags"].split(", ")]


def _names(
    place: tuple[str, ...], key: str, content: Mapping[str, Any], adapter: TypeAdapter[Any], above: tuple[str, ...]
) -> list[str]:
    """List the possible kinds of a section that names none: what is expected in the place of an unknown name."""
    asked = plain(content)
    _at(place, asked)[key] = ""
    try:
        adapter.validate_python(_at(above, asked))
    except ValidationError as error:
        wrong = [each for each in error.errors() if each["type"] == "union_tag_invalid"]
        return next(_expected(each) for each in wrong if _place((*above, *each["loc"]), asked, missing=False) == place)
    raise AssertionError("an empty name is never known")


def _at(place: tuple[str, ...], content: Any) -> Any:
    """Look up what stands at a path through the file."""
    for key in place:
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def _place(loc: tuple[int | str, ...], content: Mapping[str, Any], *, missing: bool) -> tuple[str, ...]:
    """Return the error's path through the file, without the union's chosen alternative that pydantic adds."""
    place: list[str] = []
    node: Any = content
    for index, key in enumerate(loc):
        inside = key in node if isinstance(node, Mapping) else isinstance(node, list) and isinstance(key, int)
        if inside:
            node = node[key]
        elif not missing or index < len(loc) - 1:
            continue
        place.append(str(key))
    return tuple(place)


def line_of(place: tuple[str, ...], content: Mapping[str, Any]) -> int:
    """Return the line of a key, or of the section that should hold it."""
    node: Any = content
    line = 1
    for key in place:
        if not isinstance(node, Mapping) or key not in node:
            break
        lines = getattr(getattr(node, "lc", None), "data", None) or {}  # what --set put in has no line of its own
        line = lines[key][0] + 1 if key in lines else line
        node = node[key]
    return line
