"""Times validation with all checks on: rows a second, and how it grows with the rows.

    .venv/bin/python -m bench.validate [--rows 10000 100000 1000000] [--near]

Rows are real instructions where they lie beside the clone, each copy with a word of its own, else generated ones; the
time is that of judging, profiling and writing, without importing (which is told apart). Nothing else should run
meanwhile. Questions of a benchmark are looked for, near duplicates only with --near.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.clock import REAL, ROOT, machine
from flows.files.inspect import any_file
from tasks.core.stage import quiet_libraries


def rows(count: int, *, generated: bool) -> Any:
    """Build a table of `count` chats, no two of them alike."""
    from tasks.core.parquet import as_table
    from tasks.ingest.stage import Reading
    from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon

    path = REAL / "stanford_alpaca" / "alpaca_5000.json"
    if generated or not path.is_file():
        return as_table(
            "chat", generate_rows(Recipe("made", "chat", count, 1), read_lexicon(ROOT / "data" / "lexicon.yaml"))
        )
    found: list[Any] = list(Reading("real", any_file(path)).records())
    return as_table("chat", (_marked(record, n) for n, record in enumerate(islice(cycle(found), count))))


def _marked(record: Any, number: int) -> Any:
    first = record.messages[0]
    asked = first._replace(content=f"{first.content} ({number:x})")
    return replace(record, id=f"r{number}", messages=(asked, *record.messages[1:]))


def seconds(table: Any, *, near: bool) -> tuple[float, int]:
    """Judges, profiles and writes the rows as the stage does; returns the seconds and the rows that passed."""
    from tasks.core.parquet import record_schema, write_table
    from tasks.core.records import KINDS
    from tasks.orchestration.params import load_params
    from tasks.validate.cross_row_checks import questions_of
    from tasks.validate.decide import apply_checks
    from tasks.validate.feature_cache import FeatureCache
    from tasks.validate.profile import measure, profile_page
    from tasks.validate.stage import partition, places_of

    params = load_params(ROOT / "recipes" / "quickstart.yaml").validate_
    if near:
        params = params.model_copy(update={"duplicates": params.duplicates.model_copy(update={"near": "drop"})})
    tables = {kind: record_schema(kind).empty_table() for kind in KINDS} | {"chat": table}
    benchmark = questions_of({"chat": rows(1000, generated=True)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        verdict = apply_checks(tables, {"exam": benchmark}, 0.1, params, folder / "docs", FeatureCache(None))
        profile_page(measure(verdict, params, {}, places_of(tables), []))
        _, clean = partition(tables, [*verdict.reasons, *(each.row for each in verdict.merged)])
        write_table(folder / "chat.parquet", clean["chat"])
        return time.perf_counter() - started, len(clean["chat"])


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--generated", action="store_true", help="generated rows even where real ones are")
    parser.add_argument("--near", action="store_true", help="look for near duplicates too")
    given = parser.parse_args()
    quiet_libraries()
    print(machine())
    started = time.perf_counter()
    seconds(rows(100, generated=True), near=True)
    print(f"importing and a first hundred rows: {time.perf_counter() - started:.1f} s")
    print("\n| rows | MB of text | seconds | rows/s | passed | peak memory MB |\n|---|---|---|---|---|---|")
    for count in given.rows:
        table = rows(count, generated=given.generated)
        taken, passed = seconds(table, near=given.near)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"| {count:,} | {table.nbytes >> 20} | {taken:.1f} | {count / taken:,.0f} | {passed:,} | {peak:,} |")


if __name__ == "__main__":
    main()
