"""Holds every row against a Great Expectations suite; what fails goes to quarantine with its reasons.

Reads:  data/raw/SOURCE/ of every source in params.
Writes: data/clean/ and data/quarantine/ (chat, preference and text.parquet; quarantine also reasons.parquet: id,
        source,
        reason), data/validation/ (result.json, and Data Docs: open index.html).
Params: ingest.sources (their names), validate
Fails:  no rows, or a larger share of failing rows than validate.max_quarantined (65, never retried).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import process
from tasks.errors import BadData, TemperError
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.params import Validate
from tasks.records import ChatExample, PreferencePair, Record, TextExample
from tasks.tables import read_records, write_records, write_rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from great_expectations.expectations import Expectation

REASONS = "reasons.parquet"
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
"""What looks like a control token of a chat template: in a row's text it would end turns that are not over."""

ROLE_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}


class Verdict(NamedTuple):
    """Which rows failed and why (id to reasons), and Great Expectations' own result."""

    reasons: dict[str, list[str]]
    result: dict[str, Any]


def flatten(records: Sequence[Record]) -> pd.DataFrame:
    """One line of facts per row; facts that a kind of row does not have are null, which expectations pass over."""
    import pandas as pd

    return pd.DataFrame([_facts(record) for record in records], columns=list(_COLUMNS)).astype(_COLUMNS)


_COLUMNS = {
    "id": "string",
    "kind": "string",
    "source": "string",
    "turns": "Int64",
    "roles": "string",
    "characters": "Int64",
    "blank_turns": "Int64",
    "control_tokens": "Int64",
    "replacement_characters": "Int64",
    "same_replies": "Int64",
}


def _facts(record: Record) -> dict[str, Any]:
    texts, roles, same = _texts(record)
    joined = "\n".join(texts)
    return {
        "id": record.id,
        "kind": record.kind,
        "source": record.source,
        "turns": len(texts),
        "roles": roles,
        "characters": len(joined),
        "blank_turns": sum(not text.strip() for text in texts),
        "control_tokens": len(CONTROL_TOKEN.findall(joined)),
        "replacement_characters": joined.count("\ufffd"),
        "same_replies": same,
    }


def _texts(record: Record) -> tuple[list[str], str | None, int | None]:
    """The texts of a row, its roles as letters, and whether its two replies are the same (1) or not (0)."""
    if isinstance(record, ChatExample):
        return (
            [m.content for m in record.messages],
            "".join(ROLE_LETTERS.get(m.role, "?") for m in record.messages),
            None,
        )
    if isinstance(record, PreferencePair):
        roles = "".join(ROLE_LETTERS.get(m.role, "?") for m in record.prompt) + "a"
        return (
            [m.content for m in record.prompt] + [record.chosen, record.rejected],
            roles,
            int(record.chosen.strip() == record.rejected.strip()),
        )
    if isinstance(record, TextExample):
        return [record.text], None, None
    raise TypeError(f"no facts for rows of kind {record.kind}")


def expectations(params: Validate) -> list[Expectation]:
    """The suite. Each expectation carries the reason that a failing row gets."""
    import great_expectations.expectations as gxe

    def zero(column: str, reason: str) -> Expectation:
        return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[0], meta={"reason": reason})

    return [
        gxe.ExpectColumnValuesToBeUnique(column="id", meta={"reason": "its id occurs more than once"}),
        gxe.ExpectColumnValuesToMatchRegex(
            column="roles",
            regex=r"^s?(?:u(?:at+)*a)+$",
            meta={"reason": "its turns do not alternate: an optional system turn, then user and assistant in turn"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="turns",
            min_value=1,
            max_value=params.max_turns,
            meta={"reason": "it has more turns than validate.max_turns"},
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="characters",
            min_value=1,
            max_value=params.max_characters,
            meta={"reason": "it is empty, or longer than validate.max_characters"},
        ),
        zero("blank_turns", "one of its turns is blank"),
        zero("control_tokens", "its text contains a control token such as <|im_end|>"),
        zero("replacement_characters", "its text contains U+FFFD, left by a wrong decoding"),
        zero("same_replies", "chosen and rejected are the same"),
    ]


def judge(table: pd.DataFrame, params: Validate, docs: Path) -> Verdict:
    """Runs the suite over the flattened rows and writes Data Docs.

    Raises:
        BadData: there are no rows (Great Expectations would call that a success).
        TemperError: an expectation could not be evaluated.
    """
    import great_expectations as gx

    if table.empty:
        raise BadData("there are no rows to validate", expected="at least one row in the sources of params.yaml")
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = (
        context.data_sources.add_pandas("rows").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    )
    suite = context.suites.add(gx.ExpectationSuite(name="rows", expectations=expectations(params)))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="rows", data=batch, suite=suite))
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    site = {
        "class_name": "SiteBuilder",
        "store_backend": store,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context.add_data_docs_site("docs", site)
    outcome = definition.run(
        batch_parameters={"dataframe": table},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    reasons: dict[str, list[str]] = {}
    for each in outcome.results:
        if each.exception_info.get("raised_exception") or each.expectation_config is None:
            raise TemperError("an expectation could not be evaluated", got=str(each.exception_info)[:500])
        for row in each.result.get("unexpected_index_list") or []:
            reasons.setdefault(row["id"], []).append(each.expectation_config.meta["reason"])
    context.build_data_docs(site_names=["docs"])
    return Verdict(reasons, outcome.describe_dict())


def check_share(verdict: Verdict, failing: int, rows: int, params: Validate) -> None:
    """Refuses data of which too much fails.

    Raises:
        BadData: the share of failing rows exceeds validate.max_quarantined.
    """
    if failing <= params.max_quarantined * rows:
        return
    raise BadData(
        f"{failing} of {rows} rows fail validation",
        got=f"{failing / rows:.1%}",
        expected=f"at most validate.max_quarantined = {params.max_quarantined:.1%}",
        examples=[f"{row}: {'; '.join(why)}" for row, why in verdict.reasons.items()],
        fix="look at these rows; correct the source, or raise validate.max_quarantined if they may be lost",
    )


def reason_schema() -> pa.Schema:
    """The columns of reasons.parquet: one line per row and reason."""
    import pyarrow as pa

    return pa.schema([("id", pa.string()), ("source", pa.string()), ("reason", pa.string())])


def reason_rows(records: Sequence[Record], verdict: Verdict) -> list[dict[str, str]]:
    """Why each row of the quarantine is there."""
    return [
        {"id": record.id, "source": record.source, "reason": reason}
        for record in records
        for reason in verdict.reasons.get(record.id, [])
    ]


def main() -> None:
    """The stage `validate`."""
    with process.stage(__doc__, "raw", "clean", "quarantine", "validation") as stage:
        params, sources = stage.params.validate_, stage.params.ingest.sources
        records: list[Record] = []
        for name in sources:
            read_manifest(stage.path("raw") / name)
            records += read_records(stage.path("raw") / name)
        for stale in sorted({p.name for p in stage.path("raw").iterdir() if p.is_dir()} - sources.keys()):
            print(f"validate: passing over {stage.path('raw') / stale}, which is no source of params.yaml", flush=True)
        with whole_folder(stage.path("validation")) as validation:
            verdict = judge(flatten(records), params, validation / "docs")
            (validation / "result.json").write_text(as_json(verdict.result))
        with whole_folder(stage.path("quarantine")) as quarantine:
            write_records(quarantine, (r for r in records if r.id in verdict.reasons))
            write_rows(quarantine / REASONS, reason_rows(records, verdict), reason_schema())
        check_share(
            verdict, sum(r.id in verdict.reasons for r in records), len(records), params
        )  # after the two above, so that a refusal can be looked into
        with whole_folder(stage.path("clean")) as clean:
            write_records(clean, (r for r in records if r.id not in verdict.reasons))
        print(
            f"validate: {len(records) - len(verdict.reasons)} rows clean, {len(verdict.reasons)} in quarantine",
            flush=True,
        )


if __name__ == "__main__":
    main()
