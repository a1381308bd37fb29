"""What the data of a run is like: its numbers, how far they drifted from another run's, and a page to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.html.shell import html_page
from tasks.validate.decide import Verdict
from tasks.validate.expectations import REASONS
from tasks.validate.params import Validate

if TYPE_CHECKING:
    import pandas as pd

EDGES: Mapping[str, Sequence[int]] = {
    "characters": [0, *(2**power for power in range(1, 19))],
    "words": [0, *(2**power for power in range(1, 17))],
    "turns": [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64],
}
"""The bins of each histogram, the same in every run so that runs can be compared; the last one is open."""

EXAMPLES = 5
_LEAST_SHARE = 1e-4
"""What an empty bin counts as in the stability index."""


def measure(
    verdict: Verdict,
    params: Validate,
    manifests: Mapping[str, Mapping[str, Any]],
    places: Sequence[str],
    refused: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """The numbers of one run, as profile.json has them.

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
            for name, manifest in manifests.items()
        },
        "checks": {
            name: {
                "action": _action(name, params),
                "found": outcome.found,
                "enough_pass": outcome.success,
            }
            for name, outcome in verdict.outcomes.items()
        },
        "quarantine": [
            {"reason": reason, "rows": len(rows), "examples": [places[row] for row in rows[:EXAMPLES]]}
            for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))
        ],
        "refused": [dict(row) for row in refused[:EXAMPLES]],
        "duplicates": {
            "exact": len(verdict.marks.exact),
            "near": len(verdict.marks.near),
            "examples": [[places[each.row], places[each.kept], each.similarity] for each in verdict.merged[:EXAMPLES]],
        },
        "leaks": {name: found._asdict() for name, found in verdict.marks.benchmarks.items()},
        "repairs": dict(sorted(Counter(change.check for change in verdict.repaired).items())),
        "histograms": {name: histogram(facts[name], edges) for name, edges in EDGES.items()},
        "scripts": {str(name): int(count) for name, count in sorted(facts["script"].value_counts().items())},
    }


def _action(check: str, params: Validate) -> str:
    if check == "ids":
        return "reject"
    if check.endswith(" duplicates"):
        return str(getattr(params.duplicates, check.split()[0]))
    return str(getattr(params.checks, check).action)


def histogram(values: pd.Series[int], edges: Sequence[int]) -> list[int]:
    """How many values lie from each edge to the next; the last bin is open."""
    import numpy as np

    places = np.searchsorted(np.asarray(edges), values.to_numpy(), side="right") - 1
    return [int(count) for count in np.bincount(places, minlength=len(edges))]


def stability(now: Sequence[int], before: Sequence[int]) -> float:
    """The population stability index of two histograms over the same bins: sum of (p - q) ln(p / q).

    Below 0.1 nothing moved; above 0.25 the two are different populations, by the usual reading.
    """
    shares = [
        [max(count / max(sum(counts), 1), _LEAST_SHARE) for count in counts] for counts in (list(now), list(before))
    ]
    return math.fsum((p - q) * math.log(p / q) for p, q in zip(*shares, strict=True))


def drift(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """The stability index of every column that both profiles have."""
    columns = {name: stability(now["histograms"][name], before["histograms"][name]) for name in EDGES}
    for name in ("scripts", "kinds", "sources"):
        one, other = _counts(now, name), _counts(before, name)
        keys = sorted(one.keys() | other)
        columns[name] = stability([one.get(key, 0) for key in keys], [other.get(key, 0) for key in keys])
    return columns


def _counts(numbers: Mapping[str, Any], name: str) -> dict[str, int]:
    if name == "scripts":
        return dict(numbers["scripts"])
    counts: Counter[str] = Counter()
    for source, about in numbers["sources"].items():
        if about["use"] == "train":
            for kind, rows in about["rows"].items():
                counts[kind if name == "kinds" else source] += rows
    return dict(counts)


def profile_page(numbers: Mapping[str, Any], moved: Mapping[str, float] | None = None) -> str:
    """The numbers as one HTML page that needs nothing beside it.

    Args:
        numbers: a profile.
        moved: the stability index per column against an earlier run, if there was one.
    """
    bars = {name: _bars(numbers["histograms"][name], EDGES[name]) for name in EDGES}
    bars["scripts"] = _bars(list(numbers["scripts"].values()), list(numbers["scripts"]))
    reasons = {name: reason for name, (_, reason) in REASONS.items()}
    values = {"p": numbers, "bars": bars, "moved": moved, "reasons": reasons}
    return html_page("temper: the data of this run", _PAGE, values)


def _bars(counts: Sequence[int], labels: Sequence[Any]) -> list[tuple[str, int, float]]:
    """Label, count and share of the highest, from the first bin that has something to the last."""
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return []
    top = max(counts)
    span = range(filled[0], filled[-1] + 1)
    return [(f"{labels[p]:,}" if isinstance(labels[p], int) else labels[p], counts[p], counts[p] / top) for p in span]


_PAGE = """\
<h1>The data of this run</h1>
<div class="cards">
{% for name, count in p.rows.items() %}
  <div class="card"><b>{{ count | thousands }}</b><span>{{ name }}</span></div>
{% endfor %}
</div>
<p class="note">checked = clean + quarantined + merged. Refused rows were malformed and never became rows.</p>

<h2>Sources</h2>
<div class="wide"><table>
<tr><th>source</th><th>use</th><th>rows by kind</th><th class="n">read</th><th class="n">refused</th>
<th>licence</th><th>path</th></tr>
{% for name, s in p.sources.items() %}
<tr><td>{{ name }}</td><td>{{ s.use }}</td><td>
{% for kind, n in s.rows.items() if n %}{{ n | thousands }} {{ kind }} {% endfor %}
</td><td class="n">{{ s.read | thousands }}</td><td class="n">{{ s.refused | thousands }}</td><td>{{ s.licence }}</td>
<td class="soft"><code>{{ s.path }}</code></td></tr>
{% endfor %}
</table></div>

<div class="charts">
{% for name, rows in bars.items() %}
<section><h2>{{ name }} per row</h2>
{% if rows %}
<svg viewBox="0 0 340 {{ rows | length * 18 + 4 }}" role="img" aria-label="{{ name }}">
{% for label, count, share in rows %}
<text x="62" y="{{ loop.index0 * 18 + 13 }}" text-anchor="end">{{ label }}</text>
<rect x="70" y="{{ loop.index0 * 18 + 3 }}" width="{{ (share * 200) | round(1) }}" height="13" rx="2"
class="bar"></rect>
<text x="{{ (share * 200) | round(1) + 76 }}" y="{{ loop.index0 * 18 + 13 }}">{{ count | thousands }}</text>
{% endfor %}
</svg>
{% endif %}
</section>
{% endfor %}
</div>
<p class="note">A bar counts the rows from its number up to the next bar's. Words: runs of letters, or single Chinese
and Japanese characters. Tokens of the base's own tokenizer are counted where rows are rendered.</p>

<h2>Checks</h2>
<div class="wide"><table>
<tr><th>check</th><th>finds that</th><th>action</th><th class="n">rows</th><th>enough rows pass</th></tr>
{% for name, c in p.checks.items() %}
<tr><td>{{ name }}</td><td class="soft">{{ reasons[name] }}</td><td>{{ c.action }}</td>
<td class="n">{{ c.found | thousands }}</td>
<td class="{{ 'good' if c.enough_pass else 'bad' }}">{{ 'yes' if c.enough_pass else 'no' }}</td></tr>
{% endfor %}
</table></div>

<h2>Quarantine</h2>
{% if p.quarantine or p.refused %}
<div class="wide"><table>
<tr><th>reason</th><th class="n">rows</th><th>for example</th></tr>
{% for q in p.quarantine %}
<tr><td>{{ q.reason }}</td><td class="n">{{ q.rows | thousands }}</td>
<td class="soft">{{ q.examples | join(', ') }}</td></tr>
{% endfor %}
{% for r in p.refused %}
<tr><td>refused: {{ r.reason }}</td><td class="n"></td><td class="soft"><code>{{ r.excerpt }}</code></td></tr>
{% endfor %}
</table></div>
{% else %}<p>Every row passed.</p>{% endif %}

<h2>Leaks</h2>
{% if p.leaks %}
<div class="wide"><table>
<tr><th>benchmark</th><th class="n">questions</th><th class="n">found whole</th><th class="n">found in part</th>
<th class="n">rows that hold one</th></tr>
{% for name, l in p.leaks.items() %}
<tr><td>{{ name }}</td><td class="n">{{ l.questions | thousands }}</td><td class="n">{{ l.exact | thousands }}</td>
<td class="n">{{ l.overlapping | thousands }}</td><td class="n">{{ l.rows | thousands }}</td></tr>
{% endfor %}
</table></div>
{% else %}<p>No benchmark was looked for.</p>{% endif %}

<h2>Duplicates and repairs</h2>
<p>{{ p.duplicates.exact | thousands }} rows repeat another's words, {{ p.duplicates.near | thousands }} nearly.
{% for check, n in p.repairs.items() %}{{ n | thousands }} texts repaired for {{ check }}. {% endfor %}</p>
{% for row, kept, similarity in p.duplicates.examples %}
<div class="note"><code>{{ row }}</code> repeats <code>{{ kept }}</code> ({{ '%.2f' | format(similarity) }})</div>
{% endfor %}

<h2>Drift since the last run</h2>
{% if moved %}
<div class="wide"><table>
<tr><th>column</th><th class="n">stability index</th><th></th></tr>
{% for name, value in moved.items() %}
<tr><td>{{ name }}</td><td class="n">{{ '%.3f' | format(value) }}</td>
<td class="{{ 'bad' if value > 0.25 else 'good' }}">{{ 'another population' if value > 0.25 else
'moved' if value > 0.1 else 'steady' }}</td></tr>
{% endfor %}
</table></div>
{% else %}<p>There is no earlier run to compare with.</p>{% endif %}
"""
