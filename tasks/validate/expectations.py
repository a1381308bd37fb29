"""The Great Expectations suites: what every row is held against, and what came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import BadData, TemperError
from tasks.validate.params import Validate

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations import Expectation


class Expected(NamedTuple):
    """What is expected by one name, as the `meta` of its expectation holds it.

    Attributes:
        check: its name in reports.
        action: what is done about rows that fail.
        reason: what such a row is given.
        where: the key of params, or the place in a file, that it comes from.
        required: whether the stage fails when fewer rows pass than its `mostly` says.
    """

    check: str
    action: str
    reason: str
    where: str
    required: bool


class ExpectationResult(NamedTuple):
    """Outcome of one expectation.

    Attributes:
        expected: what was expected.
        rows: the rows that fail; empty where nothing is done to rows.
        found: how many fail.
        success: whether enough passed.
        observed: the value that was seen, of an expectation over a whole column.
    """

    expected: Expected
    rows: list[int]
    found: int
    success: bool
    observed: str


REASONS: Mapping[str, str] = {
    "ids": "its id occurs more than once",
    "roles": "its turns are out of order: an optional system turn, then user and assistant in turn",
    "turns": "it has more turns than validate.max_turns",
    "characters": "it is empty, or longer than validate.max_characters",
    "blank_turns": "one of its turns is blank",
    "outer_space": "a text of it begins or ends with white space",
    "control_tokens": "its text contains a control token such as <|im_end|>",
    "template_text": "its text already contains a prompt template",
    "placeholders": "its text contains an unfilled placeholder such as {{name}}",
    "html": "its text contains HTML",
    "replacement_characters": "its text contains U+FFFD, left by a wrong decoding",
    "mojibake": "its text was decoded wrongly",
    "control_characters": "its text contains control characters",
    "unicode_normalization": "its text is not in Unicode's composed form (NFC)",
    "refusals": "a reply declines to answer",
    "language_mismatch": "its reply is in another script than its question",
    "length_outliers": "its length is far from what is usual",
    "emails": "its text contains an e-mail address",
    "phone_numbers": "its text contains a telephone number",
    "secrets": "its text contains a secret key",
    "same_replies": "chosen and rejected are the same",
    "prefix_replies": "one of its replies is a beginning of the other",
    "contradictions": "its label or order is contradicted by another row",
    "contamination": "it contains a question that models are evaluated with",
    "exact_duplicates": "another row has the same words",
    "near_duplicates": "another row has nearly the same words",
}
"""Of each check that temper brings, the reason that a row is given."""

_ORDER = r"^s?(?:u(?:a+t+)*a)+$"
"""Of the letters in `roles`: a system turn or none, then user and assistant in turn, calls before their results."""


def expectation(check: str, action: str, mostly: float, params: Validate) -> Expectation:
    """Build the expectation of Great Expectations for one check that temper brings."""
    import great_expectations.expectations as gxe

    where = f"validate.{'duplicates' if check.endswith('_duplicates') else 'checks'}.{check}"
    meta = Expected(check, action, REASONS[check], where, action in ("reject", "repair"))._asdict()
    if check == "ids":
        return gxe.ExpectColumnValuesToBeUnique(column="id", meta=meta)
    if check == "roles":
        return gxe.ExpectColumnValuesToMatchRegex(column="roles", regex=_ORDER, mostly=mostly, meta=meta)
    if check == "language_mismatch":
        scripts = {"column_A": "question_script", "column_B": "reply_script"}
        return gxe.ExpectColumnPairValuesToBeEqual(
            **scripts, ignore_row_if="either_value_is_missing", mostly=mostly, meta=meta
        )
    column, least, most = {
        "turns": ("turns", 1, params.max_turns),
        "characters": ("characters", 1, params.max_characters),
        "blank_turns": ("shortest_turn", 1, None),
    }.get(check, (check, 0, 0))
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, mostly=mostly, meta=meta)


_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""The same rows give the same pages: they bear no time, as builds that can be repeated bear none."""


def run_expectations(
    table: pd.DataFrame, suites: Mapping[str, list[Expectation]], docs: Path
) -> tuple[dict[str, ExpectationResult], dict[str, Any]]:
    """Run named suites over the flattened rows and write Data Docs of all of them.

    Args:
        table: one line of facts per row, at least one.
        suites: expectations by the suite's name, each with `Expected` as its meta; of `notices` no row numbers are
            kept, since nothing is done to rows.
        docs: the folder for the pages.

    Returns:
        The outcome by check, and Great Expectations' own result by suite.

    Raises:
        BadData: an expectation of the team does not fit what its column holds.
        TemperError: an expectation could not be evaluated.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )

    from tasks.validate import linear_regex  # noqa: F401 # it registers what regular expressions run on

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        "docs", {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index}
    )
    batch = (
        context.data_sources.add_pandas("rows")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": table})
    )
    outcomes: dict[str, ExpectationResult] = {}
    results = {}
    for name, expected in suites.items():
        if not expected:
            continue
        suite = gx.ExpectationSuite(name=name, expectations=expected)
        outcome = batch.validate(suite, result_format={"result_format": "SUMMARY" if name == "notices" else "COMPLETE"})
        for each in outcome.results:
            each.success, each.result = bool(each.success), _plain(each.result)
            found = _outcome(each)
            outcomes[found.expected.check] = found
        results[name] = outcome.describe_dict()
        run = gx.RunIdentifier(run_name=name, run_time=_NO_TIME)
        outcome.meta |= {"run_id": run, "validation_time": _NO_TIME}
        # pages show texts of rows and of params as they are, so what goes to them has no markup left
        for each in outcome.results:
            config = each.expectation_config
            stated = _escaped(config.to_json_dict())
            each.result, config.kwargs = _escaped(each.result), stated["kwargs"]
            config.description, config.notes = stated.get("description"), stated.get("notes")
        context.suites.add(gx.ExpectationSuite(**_escaped(suite.to_json_dict())))
        key = ValidationResultIdentifier(ExpectationSuiteIdentifier(name), run, outcome.batch_id)
        context.validation_results_store.set(key, outcome)
    context.build_data_docs(site_names=["docs"])
    for page in docs.rglob("*.html"):
        page.write_text(_settled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return outcomes, results


def _outcome(result: ExpectationValidationResult) -> ExpectationResult:
    """Read Great Expectations' result of one expectation."""
    expected = Expected(**result.expectation_config.meta)
    if problem := _exception_in(result.exception_info):
        if expected.check in REASONS:
            raise TemperError("an expectation could not be evaluated", where=expected.where, got=problem)
        raise BadData(
            "could not be evaluated on this column",
            where=expected.where,
            got=problem,
            fix="docs/data.md says what each column holds",
        )
    rows = [int(row) for row in result.result.get("unexpected_index_list") or []]
    observed = "" if "unexpected_percent" in result.result else _observed(result.result)
    return ExpectationResult(
        expected, rows, int(result.result.get("unexpected_count") or 0), bool(result.success), observed
    )


def _observed(result: Mapping[str, Any]) -> str:
    value = result.get("observed_value")
    return str(value.get("values", value) if isinstance(value, dict) else value)[:200]


def _exception_in(info: Mapping[str, Any]) -> str:
    """Return the first line of what was raised, if anything was: it stands at the top, or by the metric."""
    for each in (info, *info.values()):
        if isinstance(each, Mapping) and each.get("raised_exception"):
            return str(each.get("exception_message")).partition("\n")[0][:300]
    return ""


def _plain(value: Any) -> Any:
    """Return a result in JSON's own types: Great Expectations leaves some of numpy's in it, and NaN."""
    import numpy as np

    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(value: Any) -> Any:
    """Return the same value with HTML's own characters escaped in all of its texts."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escape(value, quote=False) if isinstance(value, str) else value


def _settled(page: str) -> str:
    """Remove from a page of Data Docs what differs every time: random ids, times, and a picture that counts views."""
    numbers: dict[str, str] = {}
    page = re.sub(r'src="https://[^"]*\?d=[^"]*"', 'src=""', page)
    page = re.sub(r"\d{8}T\d{6}\.\d{6}Z", f"{_NO_TIME:%Y%m%dT%H%M%S.%fZ}", page)
    return re.sub(
        r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        lambda found: numbers.setdefault(found[0], f"part-{len(numbers)}"),
        page,
    )
