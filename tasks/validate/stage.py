"""Hold every row against Great Expectations, drop duplicates, find contamination; what fails goes to quarantine.

Reads:  data/raw/SOURCE/ of every source in params, data/expectations/NAME.json of validate.expectation_suites.
Writes: data/clean/ and data/quarantine/ (KIND.parquet for every kind of row; quarantine also reasons.parquet: id,
        source, place, reason, and duplicates.parquet: id, kept, similarity), data/validation/ (profile.json and its
        page index.html, repairs.parquet: id, check, before, after; result.json of Great Expectations, Data Docs).
Params: ingest.sources (their names), validate, render.held_out
Fails:  an expectation that Great Expectations does not have so, no rows, an expectation of a whole column that fails,
        a larger share of failing rows than a check's mostly or validate.max_quarantined (65, never retried).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import as_json, atomic_folder, read_manifest
from tasks.core.errors import BadData
from tasks.core.parquet import REFUSED, read_rows, read_table, record_schema, text_schema, write_rows, write_table
from tasks.core.records import KINDS
from tasks.core.stage import run_stage
from tasks.validate.cross_row_checks import questions_of
from tasks.validate.decide import ValidationResult, apply_checks
from tasks.validate.feature_cache import FeatureCache
from tasks.validate.own_expectations import SUITES, own_expectations
from tasks.validate.params import Split, Validate
from tasks.validate.profile import measure, profile_page
from tasks.validate.repairs import Repair

if TYPE_CHECKING:
    import pyarrow as pa

REASONS_FILE, DUPLICATES_FILE, REPAIRS_FILE = "reasons.parquet", "duplicates.parquet", "repairs.parquet"


def check_share(verdict: ValidationResult, places: Sequence[str], params: Validate) -> None:
    """Refuse data of which too much fails.

    Raises:
        BadData: a check passes for fewer rows than its mostly, or more than validate.max_quarantined fail in all.
    """
    rows, failing = len(verdict.facts), len(verdict.reasons)
    short = [
        f"{outcome.expected.where}: "
        + (
            f"{outcome.found} of {rows} rows, such as {places[outcome.rows[0]]}"
            if outcome.rows
            else f"observed {outcome.observed}; {outcome.expected.reason}"
        )
        for outcome in verdict.outcomes.values()
        if outcome.expected.required and not outcome.success
    ]
    if short:
        raise BadData(
            "fewer rows pass than a check's mostly asks, or a whole column fails",
            where="validate",
            examples=short,
            fix="look at data/quarantine and data/validation/index.html; correct the source, or change the check",
        )
    if failing > params.max_quarantined * rows:
        examples = [f"{places[row]}: {'; '.join(why)}" for row, why in verdict.reasons.items()]
        raise BadData(
            f"{failing} of {rows} rows fail validation",
            got=f"{failing / rows:.1%}",
            expected=f"at most validate.max_quarantined = {params.max_quarantined:.1%}",
            examples=examples,
            fix="look at these rows; correct the source, or raise validate.max_quarantined if they may be lost",
        )


def places_of(tables: Mapping[str, pa.Table]) -> list[str]:
    """Return where each row stands: `file:row`, or its id if it was generated."""
    return [
        f"{file}:{row}" if file else row_id
        for table in tables.values()
        for file, row, row_id in zip(*(table[name].to_pylist() for name in ("file", "row", "id")), strict=True)
    ]


def read_raw(raw: Path, sources: Iterable[str]) -> tuple[dict[str, pa.Table], dict[str, list[str]], dict[str, Any]]:
    """Read the rows to train on by kind, the questions of each benchmark, and the manifests of all sources.

    Raises:
        BadData: a source was not read, or was changed since; a benchmark has no questions.
    """
    import pyarrow as pa

    manifests = {name: read_manifest(raw / name) for name in sources}
    for stale in sorted({p.name for p in raw.iterdir() if p.is_dir()} - manifests.keys()):
        print(f"validate: passing over {raw / stale}, which is no source of params.yaml", flush=True)
    learning = [name for name, about in manifests.items() if about["use"] == "train"]
    tables = {
        kind: pa.concat_tables(
            [record_schema(kind).empty_table(), *(read_table(raw / name / f"{kind}.parquet") for name in learning)]
        )
        for kind in KINDS
    }
    benchmarks = {}
    for name in (name for name, about in manifests.items() if about["use"] == "benchmark"):
        benchmarks[name] = questions_of({kind: read_table(raw / name / f"{kind}.parquet") for kind in KINDS})
        if not benchmarks[name]:
            raise BadData("asks nothing, so no contamination by it could be found", where=f"ingest.sources.{name}")
    return tables, benchmarks, manifests


def partition(tables: Mapping[str, pa.Table], rows: Sequence[int]) -> tuple[dict[str, pa.Table], dict[str, pa.Table]]:
    """Split the tables into those with and those without the rows of these numbers, which count through all kinds."""
    import numpy as np
    import pyarrow as pa

    inside, outside, first = {}, {}, 0
    for kind, table in tables.items():
        chosen = np.isin(np.arange(first, first + len(table)), rows)
        inside[kind], outside[kind] = table.filter(pa.array(chosen)), table.filter(pa.array(~chosen))
        first += len(table)
    return inside, outside


def main() -> None:
    """Run the stage `validate`."""
    with run_stage(__doc__, "raw", "clean", "quarantine", "validation") as stage:
        params, sources = stage.section("validate", Validate), stage.section("ingest.sources", dict[str, Any])
        held_out = stage.section("render", Split).held_out
        own = own_expectations(params, stage.workspace / SUITES)
        tables, benchmarks, manifests = read_raw(stage.path("raw"), sources)
        memory = FeatureCache(stage.workspace / ".temper" / "validated")
        with atomic_folder(stage.path("validation")) as validation:
            verdict = apply_checks(tables, benchmarks, held_out, params, validation / "docs", memory, own)
            places = places_of(tables)
            refused = [row for name in sources for row in read_rows(stage.path("raw") / name / REFUSED)]
            numbers = measure(verdict, params, manifests, places, refused)
            (validation / "result.json").write_text(as_json(verdict.result))
            (validation / "profile.json").write_text(as_json(numbers))
            (validation / "index.html").write_text(profile_page(numbers))
            write_rows(validation / REPAIRS_FILE, [r._asdict() for r in verdict.repaired], text_schema(Repair._fields))
        quarantined, _ = partition(tables, list(verdict.reasons))
        merged = {each.row for each in verdict.merged}
        _, clean = partition(tables, [*verdict.reasons, *merged])
        with atomic_folder(stage.path("quarantine")) as folder:
            for kind, table in quarantined.items():
                write_table(folder / f"{kind}.parquet", table)
            write_rows(
                folder / REASONS_FILE, _reason_rows(verdict, places), text_schema(("id", "source", "place", "reason"))
            )
            write_rows(folder / DUPLICATES_FILE, _duplicate_rows(verdict), _duplicate_schema())
        check_share(verdict, places, params)  # after the two above, so that a refusal can be looked into
        kept = sum(len(table) for table in clean.values())
        if kept + len(verdict.reasons) + len(merged) != len(verdict.facts):
            raise AssertionError("rows in are not rows out, quarantined and merged")
        with atomic_folder(stage.path("clean"), {"contamination_ngram": params.contamination_ngram}) as folder:
            for kind, table in clean.items():
                write_table(folder / f"{kind}.parquet", table)
        print(
            f"validate: {len(verdict.facts)} rows: {kept} clean, {len(verdict.reasons)} in quarantine, "
            f"{len(merged)} merged as duplicates; {len(verdict.repaired)} texts repaired; "
            f"{memory.known_rows} rows were known",
            flush=True,
        )
        memory.forget_others()


def _reason_rows(verdict: ValidationResult, places: Sequence[str]) -> list[dict[str, str]]:
    ids, sources = verdict.facts["id"], verdict.facts["source"]
    return [
        {"id": ids[row], "source": sources[row], "place": places[row], "reason": reason}
        for row, reasons in sorted(verdict.reasons.items())
        for reason in reasons
    ]


def _duplicate_rows(verdict: ValidationResult) -> list[dict[str, Any]]:
    ids = verdict.facts["id"]
    return [{"id": ids[each.row], "kept": ids[each.kept], "similarity": each.similarity} for each in verdict.merged]


def _duplicate_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("id", pa.string()), ("kept", pa.string()), ("similarity", pa.float64())])
