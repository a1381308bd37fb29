"""Profile of a run's data: its numbers, how far they drifted from another run's, and a page to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.html.shell import html_page
from tasks.validate.decide import ValidationResult
from tasks.validate.params import Validate

if TYPE_CHECKING:
    import pandas as pd

EDGES: dict[str, Sequence[int]] = {
    "characters": [0, *(2**power for power in range(1, 19))],
    "words": [0, *(2**power for power in range(1, 17))],
    "turns": [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64],
}
EDGES |= {f"prompt_{name}": edges for name, edges in EDGES.items()}
"""The bins of each histogram, the same in every run so that runs can be compared; the last one is open."""
SCRIPTS = {"scripts": "script", "prompt_scripts": "question_script"}
"""Facts that are counted by their value."""

PROFILE_TEMPLATE = Path(__file__).with_name("profile.html.jinja")
SHOWN_EXAMPLES = 5
_LEAST_SHARE = 1e-4
"""What an empty bin counts as in the stability index."""


def measure(
    verdict: ValidationResult,
    params: Validate,
    manifests: Mapping[str, Mapping[str, Any]],
    places: Sequence[str],
    refused: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Compute the numbers of one run, as profile.json has them.

    Args:
        verdict: what became of every row.
        params: the checks and their actions.
        manifests: of every source.
        places: where each row stands.
        refused: what ingest refused.
    """
    facts = verdict.facts
    quarantined, merged = len(verdict.reasons), len(verdict.merged)
    by_reason: dict[str, list[int]] = {}
    for row, reasons in sorted(verdict.reasons.items()):
        for reason in reasons:
            by_reason.setdefault(reason, []).append(row)
    return {
        "rows": {
            "checked": len(facts),
            "clean": len(facts) - quarantined - merged,
            "quarantined": quarantined,
            "merged": merged,
            "repaired": len({change.id for change in verdict.repaired}),
            "refused": len(refused),
        },
        "sources": {
            name: {key: manifest[key] for key in ("path", "use", "licence", "read", "refused", "rows")}
            | {"remarks": dict(manifest.get("remarks", {}))}
            for name, manifest in manifests.items()
        },
        "checks": {
            name: {
                "finds": outcome.expected.reason,
                "action": outcome.expected.action,
                "found": outcome.found,
                "observed": outcome.observed,
                "enough_pass": outcome.success,
            }
            for name, outcome in verdict.outcomes.items()
        },
        "quarantine": [
            {"reason": reason, "rows": len(rows), "examples": [places[row] for row in rows[:SHOWN_EXAMPLES]]}
            for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))
        ],
        "refused": [dict(row) for row in refused[:SHOWN_EXAMPLES]],
        "duplicates": {
            "exact": len(verdict.marks.exact),
            "near": len(verdict.marks.near),
            "examples": [
                [places[each.row], places[each.kept], each.similarity] for each in verdict.merged[:SHOWN_EXAMPLES]
            ],
        },
        "contamination": {name: found._asdict() for name, found in verdict.marks.benchmarks.items()},
        "repairs": dict(sorted(Counter(change.check for change in verdict.repaired).items())),
        **counted(facts),
    }


def counted(facts: pd.DataFrame) -> dict[str, Any]:
    """Count facts of rows: `histograms` by their bins, and scripts by their names, "none" where there are few words."""
    return {
        "histograms": {name: histogram(facts[name], edges) for name, edges in EDGES.items()},
        **{
            name: {str(value): int(count) for value, count in sorted(facts[fact].fillna("none").value_counts().items())}
            for name, fact in SCRIPTS.items()
        },
    }


def histogram(values: pd.Series[float], edges: Sequence[int]) -> list[int]:
    """Count the values from each edge to the next; the last bin is open, and what is null is in none."""
    import numpy as np

    places = np.searchsorted(np.asarray(edges), values.dropna().to_numpy(), side="right") - 1
    return [int(count) for count in np.bincount(places, minlength=len(edges))]


def stability(now: Sequence[int], before: Sequence[int]) -> float:
    """Compute the population stability index of two histograms over the same bins: sum of (p - q) ln(p / q).

    Below 0.1 nothing moved; above 0.25 the two are different populations, by the usual reading.
    """
    shares = [
        [max(count / max(sum(counts), 1), _LEAST_SHARE) for count in counts] for counts in (list(now), list(before))
    ]
    return math.fsum((p - q) * math.log(p / q) for p, q in zip(*shares, strict=True))


class Shift(NamedTuple):
    """How far a column moved between two sets of rows.

    Attributes:
        psi: the population stability index.
        expected: what it is on average where nothing moved, by chance alone: (bins - 1) (1/n + 1/m), as n m / (n + m)
            times it is distributed like chi-squared (Yurdakul and Naranjo 2020).
        rows: how many rows there are now.
        rows_before: how many there were before.
    """

    psi: float
    expected: float
    rows: int
    rows_before: int


def shift(now: Mapping[Any, int], before: Mapping[Any, int]) -> Shift:
    """Compare a column's counts by bin; bins that both have nothing in are none."""
    bins = sorted({key for counts in (now, before) for key, count in counts.items() if count})
    counts = [[each.get(key, 0) for key in bins] for each in (now, before)]
    rows, rows_before = map(sum, counts)
    expected = (len(bins) - 1) * (1 / rows + 1 / rows_before) if rows and rows_before else math.nan
    return Shift(stability(*counts), expected, rows, rows_before)


def drift(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """Compute the stability index of every column that both profiles have."""
    columns, earlier = columns_of(now), columns_of(before)
    return {name: shift(bins, earlier[name]).psi for name, bins in columns.items() if name in earlier}


def columns_of(numbers: Mapping[str, Any]) -> dict[str, Mapping[Any, int]]:
    """Return the columns of a profile that can be compared, each as counts by bin; earlier profiles have fewer."""
    columns: dict[str, Mapping[Any, int]] = {
        name: dict(enumerate(counts)) for name, counts in numbers["histograms"].items()
    }
    columns |= {name: numbers[name] for name in SCRIPTS if name in numbers}
    kinds, sources = Counter[str](), Counter[str]()
    for source, about in numbers.get("sources", {}).items():
        if about["use"] == "train":
            for kind, rows in about["rows"].items():
                kinds[kind] += rows
                sources[source] += rows
    return {**columns, "kinds": kinds, "sources": sources} if "sources" in numbers else columns


def profile_page(
    numbers: Mapping[str, Any], moved: Mapping[str, float] | None = None, live: Mapping[str, Any] | None = None
) -> str:
    """Render the numbers as one HTML page that needs nothing beside it.

    Args:
        numbers: a profile.
        moved: the stability index per column against an earlier run, empty if there was none; without it the page
            says nothing of drift, as a stage sees this run alone.
        live: the drift of what is asked and answered, where a record was read.
    """
    return html_page(PROFILE_TEMPLATE, profile_values(numbers, moved, live))


def profile_values(
    numbers: Mapping[str, Any], moved: Mapping[str, float] | None = None, live: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect what the template of the profile is filled with, as `profile_page`; earlier profiles have less."""
    histograms = numbers["histograms"]
    bars = {name: _bars(histograms[name], EDGES[name]) for name in EDGES if name in histograms}
    bars |= {name: _bars(list(numbers[name].values()), list(numbers[name])) for name in SCRIPTS if name in numbers}
    return {"p": numbers, "bars": bars, "moved": moved, "live": live}


def _bars(counts: Sequence[int], labels: Sequence[Any]) -> list[tuple[str, int, float]]:
    """Label, count and share of the highest, from the first bin that has something to the last."""
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return []
    top = max(counts)
    span = range(filled[0], filled[-1] + 1)
    return [(f"{labels[p]:,}" if isinstance(labels[p], int) else labels[p], counts[p], counts[p] / top) for p in span]
