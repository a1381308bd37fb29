"""Reads and checks a params file: plain YAML, every wrong key named at once, each with its line and its dotted path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tasks.errors import BadParams, did_you_mean
from tasks.evaluate_params import HELD_OUT
from tasks.params import Params


def load(path: Path) -> Params:
    """Reads and checks a params file.

    Raises:
        BadParams: the file is missing or not YAML, or one or more keys are wrong; all of them are named.
    """
    return check(read_yaml(path), str(path))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The file's content with line numbers and comments kept (a ruamel round-trip mapping).

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
    """Params are plain values: a tag could ask for code, and a few aliases of aliases for all memory there is."""
    from ruamel.yaml.events import AliasEvent

    trick = "alias" if isinstance(event, AliasEvent) else "tag" if getattr(event, "ctag", None) else ""
    if trick:
        where = f"{path}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
        raise BadParams(
            f"a YAML {trick} is not allowed here", where=where, expected="a plain value", fix="write it out"
        )


def check(content: Mapping[str, Any], where: str) -> Params:
    """The typed form of a file's content; `where` names the file in errors.

    Raises:
        BadParams: one or more keys are wrong; all of them are named, each with its line.
    """
    try:
        params = Params.model_validate(_plain(content))
    except ValidationError as error:
        raise _wrong(_problems(error.errors(), content), where) from error
    if unasked := params.unasked_suites():
        suites = [HELD_OUT, *params.evaluate.suites]
        raise _wrong([_unasked(place, suites, content) for place in unasked], where)
    return params


def _wrong(problems: Sequence[str], where: str) -> BadParams:
    return BadParams(
        f"{len(problems)} {'key is' if len(problems) == 1 else 'keys are'} wrong",
        where=where,
        examples=problems,
        fix="see the comments in recipes/quickstart.yaml",
    )


def _unasked(place: tuple[str, ...], suites: Sequence[str], content: Mapping[str, Any]) -> str:
    meant = did_you_mean(place[-1], suites) or f"; there are: {', '.join(suites)}"
    return f'line {_line(place, content)}: {".".join(place[:2])}: no suite "{place[-1]}" is asked{meant}'


def _plain(value: Any) -> Any:
    """YAML nodes as the builtin types that strict validation wants."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for builtin in (bool, int, float, str):
        if isinstance(value, builtin):
            return builtin(value)
    return value


def _problems(errors: list[ErrorDetails], content: Mapping[str, Any]) -> list[str]:
    """One line per problem. An unknown key next to a missing one of a similar name is a misspelling: said once."""
    places = [_place(error["loc"], content, missing=error["type"] == "missing") for error in errors]
    missing = {place for place, error in zip(places, errors, strict=True) if error["type"] == "missing"}
    unknown = {place for place, error in zip(places, errors, strict=True) if error["type"] == "extra_forbidden"}
    lines: dict[tuple[str, ...], str] = {}
    for place, error in zip(places, errors, strict=True):
        if error["type"] == "extra_forbidden":
            siblings = {other[-1]: other for other in missing if other[:-1] == place[:-1]}
            if near := _nearest(place[-1], siblings):
                lines[place] = f'unknown key; did you mean "{near}"?'
                missing.discard(siblings[near])
            else:
                present = [key for key in _at(place[:-1], content) if (*place[:-1], key) not in unknown]
                near = _nearest(place[-1], present)
                lines[place] = "unknown key" + (
                    f'; the nearest known one is "{near}", which is given too' if near else ""
                )
        elif error["type"] == "union_tag_not_found":
            key = _tag(error)
            lines[*place, key] = f"is missing; one of: {', '.join(_names(place, key, content))}"
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
    lines = {place: text for place, text in lines.items() if place not in inner}
    return [f"line {_line(place, content)}: {'.'.join(place)}: {text}" for place, text in sorted(lines.items())]


def _nearest(key: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(key, list(known), n=1, cutoff=0.6)), None)


def _tag(error: ErrorDetails) -> str:
    """The key that says which alternative of a section is meant, such as `name`."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _expected(error: ErrorDetails) -> list[str]:
    return [name.strip("'") for name in error["ctx"]["expected_tags"].split(", ")]


def _names(place: tuple[str, ...], key: str, content: Mapping[str, Any]) -> list[str]:
    """What a section may be that does not say it: what is expected in the place of a name that nothing has."""
    asked = _plain(content)
    _at(place, asked)[key] = ""
    try:
        Params.model_validate(asked)
    except ValidationError as error:
        wrong = [each for each in error.errors() if each["type"] == "union_tag_invalid"]
        return next(_expected(each) for each in wrong if _place(each["loc"], asked, missing=False) == place)
    raise AssertionError("an empty name is never known")


def _at(place: tuple[str, ...], content: Any) -> Any:
    """What stands at a path through the file."""
    for key in place:
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def _place(loc: tuple[int | str, ...], content: Mapping[str, Any], *, missing: bool) -> tuple[str, ...]:
    """The error's path through the file, without the chosen alternative of a union, which pydantic puts in between."""
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


def _line(place: tuple[str, ...], content: Mapping[str, Any]) -> int:
    """The line of a key, or of the section that should hold it."""
    node: Any = content
    line = 1
    for key in place:
        if not isinstance(node, Mapping) or key not in node:
            break
        line = node.lc.key(key)[0] + 1 if hasattr(node, "lc") else line
        node = node[key]
    return line
