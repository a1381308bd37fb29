"""Expectations of the team's own, from params and from suite files, checked whole before any row is looked at."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import BadParams, did_you_mean
from tasks.validate.columns import COLUMNS
from tasks.validate.expectations import REASONS, Expected
from tasks.validate.params import Validate

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation

SUITES = Path("data/expectations")
"""Where suite files lie in a workspace."""

_NOT_HERE = {
    "like_pattern": "runs in a SQL database alone; expect_column_values_to_match_regex does the same",
    "_json_schema": "stops at the first text that is not JSON; expect_column_values_to_be_json_parseable finds those",
    "_type": "looks at the type of a column that temper makes, and at nothing of your rows",
    "multicolumn_values_to_be_unique": "is now called expect_select_column_values_to_be_unique_within_record",
}
"""Why an expectation that fits otherwise is refused, by a part of its name."""

_RUNTIME = {"id", "meta", "result_format", "catch_exceptions", "rendered_content", "windows", "batch_id",
            "library_metadata"}  # fmt: skip
"""Fields of Great Expectations' classes that are no arguments of an expectation."""


class _Stated(NamedTuple):
    """An expectation as it is written, in params or in a suite file."""

    name: str
    where: str
    type: str
    arguments: dict[str, Any]
    action: str
    mostly: float | None


class OwnExpectation(NamedTuple):
    """An expectation of the team's own, ready to run.

    Attributes:
        expectation: of Great Expectations, with `Expected` as its meta.
        columns: those that it looks at.
    """

    expectation: Expectation
    columns: frozenset[str]

    @property
    def expected(self) -> Expected:
        """Return what is expected, by which name."""
        return Expected(**self.expectation.meta)


def own_expectations(params: Validate, folder: Path) -> list[OwnExpectation]:
    """Read the expectations of params and of the suite files that params name.

    Args:
        params: the section `validate`.
        folder: of the suite files.

    Raises:
        BadParams: a suite file is missing or is none; an expectation, an argument or a column is unknown or unfit.
    """
    stated = [
        _Stated(name, f"validate.expectations.{name}", each.type, each.arguments, each.action, each.mostly)
        for name, each in params.expectations.items()
    ]
    for suite in params.expectation_suites:
        stated += _suite(folder, suite)
    places: dict[str, str] = dict.fromkeys(REASONS, "a check of temper's own")
    for each in stated:
        if each.name in places:
            raise BadParams(
                f'the name "{each.name}" is taken',
                where=each.where,
                got=f"the name of {places[each.name]}",
                fix="give it another name; in a suite file that is `meta: {name: ...}`",
            )
        places[each.name] = each.where
    built, wrong = [], []
    for each in stated:
        try:
            built.append(_built(each))
        except BadParams as error:
            wrong.append(error)
    if len(wrong) > 1:
        raise BadParams(f"{len(wrong)} expectations are wrong", where="validate", examples=[e.line() for e in wrong])
    if wrong:
        raise wrong[0]
    return built


def _suite(folder: Path, name: str) -> Iterator[_Stated]:
    """Read a suite as Great Expectations writes it: `type`, `kwargs` and `meta` of each expectation."""
    path, shown = folder / f"{name}.json", str(SUITES / f"{name}.json")
    if not path.is_file():
        there = [file.stem for file in folder.glob("*.json")]
        raise BadParams(
            f'there is no suite "{name}"{did_you_mean(name, there)}',
            where="validate.expectation_suites",
            expected=f"one of: {', '.join(sorted(there))}" if there else f"a file {shown}",
        )
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["expectations"]
        entries = [(each.get("type") or each["expectation_type"], each) for each in listed]
        known = [(str(type_), dict(each.get("kwargs") or {}), dict(each.get("meta") or {})) for type_, each in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadParams(
            "is no suite of Great Expectations",
            where=shown,
            got=f"{type(error).__name__}: {error}"[:200],
            expected='an object with "expectations", each with "type" and "kwargs"',
        ) from error
    names: set[str] = set()
    for place, (type_, arguments, meta) in enumerate(known):
        where = f"{shown}: expectations[{place}]"
        if (action := meta.get("action", "reject")) not in ("reject", "warn"):
            raise BadParams("meta.action is unknown", where=where, got=repr(action), expected="reject or warn")
        mostly = arguments.pop("mostly", None)
        if mostly is not None and not (isinstance(mostly, (int, float)) and 0 <= mostly <= 1):
            raise BadParams("mostly is no share", where=where, got=repr(mostly), expected="a number from 0 to 1")
        arguments.pop("batch_id", None)
        if description := listed[place].get("description"):
            arguments.setdefault("description", description)
        looks_at = [str(arguments[key]) for key in ("column", "column_A", "column_B") if key in arguments]
        own = str(meta.get("name") or listed[place].get("id") or " ".join([type_, *looks_at]))
        while own in names and not meta.get("name"):
            own += "'"
        names.add(own)
        yield _Stated(own, where, type_, arguments, action, mostly)


def _built(stated: _Stated) -> OwnExpectation:
    """Build an expectation, or say what of it is wrong."""
    import great_expectations.expectations as gxe

    classes: list[Any] = [each for each in vars(gxe).values() if isinstance(each, type)]
    types = {each.expectation_type: each for each in classes}
    kind = types.get(stated.type)
    if kind is None:
        raise BadParams(
            f'Great Expectations has no "{stated.type}"{did_you_mean(stated.type, types)}', where=stated.where
        )
    whole = _looks_at_whole_columns(stated, kind)
    known = sorted({"action", "mostly", *kind.__fields__} - _RUNTIME)
    for name in stated.arguments:
        if name not in known:
            raise BadParams(
                f'{stated.type} has no argument "{name}"{did_you_mean(name, known)}',
                where=stated.where,
                expected=f"some of: {', '.join(known)}",
            )
    if whole and stated.mostly is not None:
        raise BadParams(f"{stated.type} looks at a whole column, of which there is no mostly", where=stated.where)
    columns = {*_named_columns(stated.arguments), *_columns_of_condition(stated.arguments.get("row_condition"), stated)}
    for column in sorted(columns):
        if column not in COLUMNS:
            raise BadParams(
                f'rows have no column "{column}"{did_you_mean(column, COLUMNS)}',
                where=stated.where,
                expected=f"one of: {', '.join(COLUMNS)}",
            )
    _check_regexes(stated, kind)
    if "$PARAMETER" in json.dumps(stated.arguments):
        raise BadParams("a $PARAMETER has no value here", where=stated.where, fix="write the value")
    required = stated.action == "reject" and (whole or stated.mostly is not None)
    reason = f"expectation {stated.name}: {_in_words(stated)}"
    meta = Expected(stated.name, stated.action, reason, stated.where, required)._asdict()
    arguments = stated.arguments | ({} if stated.mostly is None else {"mostly": stated.mostly})
    arguments.pop("condition_parser", None)  # a plain condition is read the same by each
    if isinstance(condition := arguments.get("row_condition"), str):
        arguments["row_condition"] = {"type": "pass_through", "pass_through_filter": condition}
    try:
        built = kind(**arguments, meta=meta, catch_exceptions=True)
    except (ValueError, TypeError) as error:  # pydantic's is a ValueError
        raise BadParams(f"{stated.type} cannot be made of this", where=stated.where, got=_wrong(error)) from error
    return OwnExpectation(built, frozenset(columns))


def _looks_at_whole_columns(stated: _Stated, kind: type[Expectation]) -> bool:
    """Return whether an expectation is one of a whole column or table, which has no failing rows.

    Raises:
        BadParams: it is neither that nor one of single rows, or cannot be used for another reason.
    """
    from great_expectations.expectations import expectation as bases

    of_rows = (bases.ColumnMapExpectation, bases.ColumnPairMapExpectation, bases.MulticolumnMapExpectation)
    whole = issubclass(kind, bases.ColumnAggregateExpectation) or stated.type in (
        "expect_table_row_count_to_be_between",
        "expect_table_row_count_to_equal",
    )
    why = next((why for part, why in _NOT_HERE.items() if part in stated.type), "")
    if not why and not whole and not issubclass(kind, of_rows):
        why = "needs a query, another table, or the columns of a table that is not temper's"
    if why:
        raise BadParams(f"{stated.type} cannot be used here: it {why}", where=stated.where)
    return whole


def _named_columns(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name in ("column", "column_A", "column_B"):
        if name in arguments:
            yield str(arguments[name])
    several = arguments.get("column_list")
    yield from map(str, several if isinstance(several, list) else [])


_PLAIN_NODES = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop,
                ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple)  # fmt: skip
"""What a condition may be made of; pandas would also call functions and look up variables."""


def _columns_of_condition(condition: Any, stated: _Stated) -> set[str]:
    """Return the columns of a `row_condition`, which is either text or Great Expectations' own mapping.

    Raises:
        BadParams: it does more than compare columns with values.
    """
    if isinstance(condition, dict) and condition.get("type") == "pass_through":
        condition = condition.get("pass_through_filter")
    if isinstance(condition, dict):
        inner = condition.get("conditions")
        column = condition.get("column")
        parts = [_columns_of_condition(each, stated) for each in (inner if isinstance(inner, list) else [])]
        return {str(column.get("name"))}.union(*parts) if isinstance(column, dict) else set().union(*parts)
    if condition is None:
        return set()
    nodes: list[ast.AST] = []
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        nodes = list(ast.walk(ast.parse(str(condition).strip(), mode="eval")))
    if not nodes or not all(isinstance(node, _PLAIN_NODES) for node in nodes):
        raise BadParams(
            "row_condition is no plain comparison",
            where=stated.where,
            got=str(condition)[:200],
            expected='columns compared with values, such as: kind == "chat" and turns > 2',
        )
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _check_regexes(stated: _Stated, kind: type[Expectation]) -> None:
    """Refuse patterns that are none, or that RE2 does not know."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in {"regex", "regex_list"} & kind.__fields__.keys():
        given = stated.arguments.get(name)
        patterns: Sequence[Any] = given if isinstance(given, list) else [given]
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise BadParams(f"{name} is no pattern", where=stated.where, got=repr(given), expected="a text, or several")
        for pattern in patterns:
            try:
                pc.match_substring_regex(pa.array([""]), pattern=pattern)
            except pa.ArrowInvalid as error:
                raise BadParams(
                    "the regular expression is wrong, or more than RE2 can do",
                    where=stated.where,
                    got=f"{pattern} ({str(error).rpartition(': ')[2]})",
                    expected="a pattern without lookahead, lookbehind and backreferences: those can take for ever",
                    fix="say what must not match in an expectation of its own: expect_column_values_to_not_match_regex",
                ) from error


def _wrong(error: Exception) -> str:
    """Return what Great Expectations says of arguments, one line; of a union only the first complaint."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)[:300]
    told: dict[str, str] = {}
    for each in errors():
        told.setdefault(str(each["loc"][0]).replace("__root__", ""), each["msg"])
    told |= {"row_condition": "is no comparison of a column with a value"} if "row_condition" in told else {}
    return "; ".join(f"{place}: {message}".removeprefix(": ") for place, message in told.items())[:300]


def _in_words(stated: _Stated) -> str:
    if description := stated.arguments.get("description"):
        return str(description)
    listed = ", ".join(f"{name} {value}" for name, value in stated.arguments.items())
    words = stated.type.removeprefix("expect_").replace("_", " ")
    return f"{words} ({listed})" if listed else words
