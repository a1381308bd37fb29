"""The Great Expectations suites: what every row is held against, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import BadData, TemperError
from tasks.validate.params import Validate

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.expectations import Expectation


class ExpectationResult(NamedTuple):
    """Outcome of one check: the rows in which it found something, whether enough passed, and how many there were."""

    rows: list[int]
    found: int
    success: bool


REASONS: Mapping[str, tuple[str, str]] = {
    "ids": ("id", "its id occurs more than once"),
    "roles": ("disorder", "its turns are out of order: an optional system turn, then user and assistant in turn"),
    "turns": ("turns", "it has more turns than validate.max_turns"),
    "characters": ("characters", "it is empty, or longer than validate.max_characters"),
    "blank_turns": ("blank_turns", "one of its turns is blank"),
    "outer_space": ("outer_space", "a text of it begins or ends with white space"),
    "control_tokens": ("control_tokens", "its text contains a control token such as <|im_end|>"),
    "template_text": ("template_text", "its text already contains a prompt template"),
    "placeholders": ("placeholders", "its text contains an unfilled placeholder such as {{name}}"),
    "html": ("html", "its text contains HTML"),
    "replacement_characters": ("replacement_characters", "its text contains U+FFFD, left by a wrong decoding"),
    "mojibake": ("mojibake", "its text was decoded wrongly"),
    "control_characters": ("control_characters", "its text contains control characters"),
    "unicode_normalization": ("unicode_normalization", "its text is not in Unicode's composed form (NFC)"),
    "refusals": ("refusals", "a reply declines to answer"),
    "language_mismatch": ("language_mismatch", "its reply is in another script than its question"),
    "length_outliers": ("length_outlier", "its length is far from what is usual"),
    "emails": ("emails", "its text contains an e-mail address"),
    "phone_numbers": ("phone_numbers", "its text contains a telephone number"),
    "secrets": ("secrets", "its text contains a secret key"),
    "same_replies": ("same_replies", "chosen and rejected are the same"),
    "prefix_replies": ("prefix_replies", "one of its replies is a beginning of the other"),
    "contradictions": ("contradiction", "its label or order is contradicted by another row"),
    "contamination": ("contamination", "it contains a question that models are evaluated with"),
    "exact duplicates": ("exact_duplicate", "another row has the same words"),
    "near duplicates": ("near_duplicate", "another row has nearly the same words"),
}
"""Of each check, the column that it looks at and the reason that a row is given; all but two ask for zero."""


def expectation(check: str, mostly: float, params: Validate) -> Expectation:
    """Build the expectation of Great Expectations for one check."""
    import great_expectations.expectations as gxe

    column, reason = REASONS[check]
    meta = {"check": check, "reason": reason}
    if check == "ids":
        return gxe.ExpectColumnValuesToBeUnique(column=column, meta=meta)
    if top := {"turns": params.max_turns, "characters": params.max_characters}.get(check):
        return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=1, max_value=top, mostly=mostly, meta=meta)
    # a set of one, since Great Expectations compares ranges value by value in Python
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[0], mostly=mostly, meta=meta)


_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""The same rows give the same pages: they bear no time, as builds that can be repeated bear none."""


def run_expectations(
    table: pd.DataFrame, suites: Mapping[str, list[Expectation]], docs: Path
) -> tuple[dict[str, ExpectationResult], dict[str, Any]]:
    """Run named suites over the flattened rows and write Data Docs of all of them.

    Args:
        table: one line of facts per row.
        suites: expectations by the suite's name; of `notices` no row numbers are kept, since nothing is done to rows.
        docs: the folder for the pages.

    Returns:
        The outcome by check, and Great Expectations' own result by suite.

    Raises:
        BadData: there are no rows (Great Expectations would call that a success).
        TemperError: an expectation could not be evaluated.
    """
    import great_expectations as gx

    if table.empty:
        raise BadData("there are no rows to validate", expected="at least one row in the sources of params.yaml")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(
        "docs", {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index}
    )
    batch = (
        context.data_sources.add_pandas("rows").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    )
    outcomes: dict[str, ExpectationResult] = {}
    results = {}
    for name, expected in suites.items():
        if not expected:
            continue
        suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expected))
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        detail = "SUMMARY" if name == "notices" else "COMPLETE"
        outcome = definition.run(
            batch_parameters={"dataframe": table},
            result_format={"result_format": detail},
            run_id=gx.RunIdentifier(run_name=name, run_time=_NO_TIME),
        )
        results[name] = outcome.describe_dict()
        for each in outcome.results:
            if each.exception_info.get("raised_exception") or each.expectation_config is None:
                raise TemperError("an expectation could not be evaluated", got=str(each.exception_info)[:500])
            rows = [int(row) for row in each.result.get("unexpected_index_list") or []]
            outcomes[each.expectation_config.meta["check"]] = ExpectationResult(
                rows, int(each.result["unexpected_count"]), bool(each.success)
            )
    context.build_data_docs(site_names=["docs"])
    for page in docs.rglob("*.html"):
        page.write_text(_settled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return outcomes, results


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
