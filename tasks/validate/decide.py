"""All rows held against the checks of params: repairs, comparison, expectations, and what becomes of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.errors import BadData
from tasks.core.parquet import as_records, as_table
from tasks.validate.columns import TEXT_COLUMNS, column_of_rows
from tasks.validate.cross_row_checks import CrossRowFlags, cross_row_checks
from tasks.validate.duplicates import Duplicate
from tasks.validate.expectations import ExpectationResult, expectation, run_expectations
from tasks.validate.feature_cache import FeatureCache
from tasks.validate.own_expectations import OwnExpectation
from tasks.validate.params import Validate
from tasks.validate.prompt_groups import group_near_prompts
from tasks.validate.repairs import REPAIRS, Repair, repair
from tasks.validate.row_features import row_features

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from great_expectations.expectations import Expectation
    from numpy.typing import NDArray


_ALWAYS = ("ids", "contamination")
"""What rejects a row of an accepted source, too: no look at the row alone could tell."""


@dataclass(frozen=True)
class ValidationResult:
    """Verdict on every row.

    Attributes:
        facts: one line per row, in the order of the kinds' tables, with its marks.
        reasons: why each row goes to quarantine, by row.
        merged: rows that repeat another that is kept.
        repaired: every text that was changed.
        marks: duplicates and contamination, as they were found.
        outcomes: the outcome of each check.
        result: Great Expectations' own result.
    """

    facts: pd.DataFrame
    reasons: dict[int, list[str]]
    merged: list[Duplicate]
    repaired: list[Repair]
    marks: CrossRowFlags
    outcomes: dict[str, ExpectationResult]
    result: dict[str, Any]


def apply_checks(
    tables: dict[str, pa.Table],
    benchmarks: Mapping[str, list[str]],
    held_out: float,
    params: Validate,
    docs: Path,
    memory: FeatureCache,
    own: Sequence[OwnExpectation] = (),
) -> ValidationResult:
    """Check all rows together.

    Args:
        tables: the rows of each kind; rows that are repaired, and groups of near-equal prompts, are changed in here.
        benchmarks: the questions of every benchmark.
        held_out: the share of groups that is kept for evaluation.
        params: what is looked for, and what is done about it.
        docs: where Data Docs go.
        memory: facts of rows that were checked before.
        own: the team's expectations.

    Raises:
        BadData: there are no rows, or an expectation of the team does not fit what its column holds.
        TemperError: an expectation could not be evaluated.
    """
    import pandas as pd

    if not any(map(len, tables.values())):
        raise BadData("there are no rows to validate", expected="at least one row in the sources of params.yaml")
    facts = {kind: memory.facts_of(table, kind) for kind, table in tables.items()}
    repaired = [entry for kind in tables for entry in _repair(kind, tables, facts, params)]
    group_near_prompts(tables, params)
    # without the empty ones: a column of nothing would make the whole column one of objects, which is slow
    table = pd.concat([facts[kind].assign(kind=kind) for kind in tables if len(tables[kind])], ignore_index=True)
    for name in ("id", "source"):
        table[name] = column_of_rows(tables, name)
    marks = cross_row_checks(tables, benchmarks, held_out, params)
    table["contradictions"], table["contamination"] = marks.contradiction, marks.contamination
    table["length_outliers"] = _outliers(table, params.outlier_deviations)
    for name, duplicates in (("exact", marks.exact), ("near", marks.near)):
        table[f"{name}_duplicates"] = 0
        table.loc[[each.row for each in duplicates], f"{name}_duplicates"] = 1

    suites: dict[str, list[Expectation]] = {"rows": [expectation("ids", "reject", 1.0, params)], "notices": []}
    for name in type(params.checks).model_fields:
        check = getattr(params.checks, name)
        if check.action != "ignore":
            suite = suites["notices" if check.action == "warn" else "rows"]
            suite.append(expectation(name, check.action, check.mostly, params))
    for name in ("exact", "near"):
        action = getattr(params.duplicates, name)
        suites["notices"].append(expectation(f"{name}_duplicates", action, 0.0, params))
    for each in own:
        suites["notices" if each.expected.action == "warn" else "rows"].append(each.expectation)
    for name in sorted({name for each in own for name in each.columns if name in TEXT_COLUMNS}):
        table[name] = column_of_rows(tables, name)
    outcomes, result = run_expectations(table, suites, docs)
    table = table.drop(columns=list(TEXT_COLUMNS), errors="ignore")
    reasons: dict[int, list[str]] = {}
    accepted = table["source"].isin(params.accepted).to_numpy()
    for name, outcome in outcomes.items():
        for row in outcome.rows:
            if accepted[row] and name not in _ALWAYS:
                continue
            why = (
                f"it contains a question of {', '.join(marks.contaminated_by[row])}"
                if name == "contamination"
                else outcome.expected.reason
            )
            reasons.setdefault(row, []).append(why)
    merged = _merge(marks, reasons, params)
    return ValidationResult(table, reasons, merged, repaired, marks, outcomes, result)


def _repair(kind: str, tables: dict[str, pa.Table], facts: dict[str, pd.DataFrame], params: Validate) -> list[Repair]:
    """Repair the rows of one kind in which a check with `action: repair` finds something, and check them again."""
    import numpy as np
    import pyarrow as pa

    checks = [name for name in REPAIRS if getattr(params.checks, name).action == "repair"]
    found = np.flatnonzero((facts[kind][checks] > 0).any(axis=1)) if checks else np.empty(0, np.int64)
    if not len(found):
        return []
    done: list[Repair] = []
    records = []
    for record in as_records(kind, tables[kind].take(pa.array(found))):
        record, changes = repair(record, checks)
        records.append(record)
        done += changes
    repaired = as_table(kind, records)
    order = np.arange(len(facts[kind]))
    order[found] = len(order) + np.arange(len(found))
    tables[kind] = pa.concat_tables([tables[kind], repaired]).take(pa.array(order))
    looked_at_again = row_features(repaired, kind).set_index(found)
    for name in facts[kind]:  # all columns at once would take them through Python's objects
        facts[kind].loc[found, name] = looked_at_again[name]
    return done


def _outliers(table: pd.DataFrame, deviations: float) -> NDArray[np.int64]:
    """1 for rows whose length is further from the median of their kind than so many deviations, in logarithms.

    The deviation is 1.4826 times the median absolute one, which is a normal distribution's standard deviation.
    """
    import numpy as np

    found = np.zeros(len(table), np.int64)
    for rows in table.groupby("kind").indices.values():
        length = np.log1p(table["characters"].to_numpy()[rows].astype(float))
        away = np.abs(length - np.median(length))
        found[rows] = away > deviations * max(1.4826 * float(np.median(away)), 0.1)
    return found


def _merge(marks: CrossRowFlags, reasons: Mapping[int, object], params: Validate) -> list[Duplicate]:
    """Return the duplicates merged into a row that stays; rows in quarantine neither merge nor are merged into."""
    chosen = params.duplicates
    found = [*(marks.exact if chosen.exact == "drop" else []), *(marks.near if chosen.near == "drop" else [])]
    merged: dict[int, Duplicate] = {}
    instead: dict[int, int] = {}  # of a row in quarantine, the first of its duplicates that is not
    for each in found:
        if each.row in reasons:
            continue
        kept = instead.setdefault(each.kept, each.row) if each.kept in reasons else each.kept
        if kept != each.row:
            merged.setdefault(each.row, each._replace(kept=kept))
    return [merged[row]._replace(kept=_kept(row, merged)) for row in sorted(merged)]


def _kept(row: int, merged: Mapping[int, Duplicate]) -> int:
    """Return the row that stays, at the end of a chain of duplicates; kept rows come before theirs, so chains end."""
    while row in merged:
        row = merged[row].kept
    return row
