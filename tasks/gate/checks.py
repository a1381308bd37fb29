"""The gate: whether the evidence lets a version become champion. Pure, and shut whenever a number is missing.

Two models are compared on the items that both answered: the same suite, task, prompt and target. What is said of a
difference of their figures:

- its interval, by the paired bootstrap (Efron 1979): items are drawn with replacement, both models' results together;
- its noise floor: the difference that is reached, with the same confidence, when on each item a coin decides which
  model gets which of the two results, that is when the models are equally good (the paired permutation test; Fisher
  1935). Greedy evaluations repeat to the bit, so the choice of items is all the noise there is.

A difference counts when it is beyond the floor and its interval leaves zero out; any other counts as none. The
bootstrap alone takes two items that went well for proof; the permutations alone give no interval. Where nothing counts
and the floor itself is above `promote.max_noise`, as with few items, a loss could not be seen: the comparison fails.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tasks.gate.live import LiveEvidence
from tasks.gate.params import LiveCheck, Promote
from tasks.gate.tallies import Tally, preference, share_difference, wilson
from tasks.reports.items import Items, compare_items
from tasks.reports.statistics import Difference


class VersionRecord(NamedTuple):
    """Evidence on a version for the gate.

    Attributes:
        version: its number.
        method: what trained it.
        suites: its results, by suite.
        base: the base model's, by suite.
        templates: the SHA-256 of the chat template in training, in evaluation and in the model.
        mean_kl: of the model that was trained against the model that is served, nats per token.
        contamination: of each suite the share of items that stand in training rows.
        broken: what is wrong with the model's files or signature; empty when they are as they were registered.
    """

    version: str
    method: str
    suites: Mapping[str, Items]
    base: Mapping[str, Items]
    templates: Mapping[str, str]
    mean_kl: float
    contamination: Mapping[str, float]
    broken: str


class CheckResult(NamedTuple):
    """One check of the gate.

    Attributes:
        check: what was looked at.
        suite: on which suite; empty where it is none's matter.
        passed: whether it speaks for the version.
        said: what was found, in words.
        difference: the numbers of a comparison.
    """

    check: str
    suite: str
    passed: bool
    said: str
    difference: Difference | None = None


class GateDecision(NamedTuple):
    """Verdict on whether a version may become champion, what it was compared with, and what was seen of it live."""

    version: str
    champion: str
    passed: bool
    findings: list[CheckResult]
    live: LiveEvidence | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON has it, where a number that is missing is null."""
        findings = []
        for finding in self.findings:
            numbers = finding.difference._asdict() if finding.difference else {}
            told = {name: None if math.isnan(value) else value for name, value in numbers.items()}
            findings.append({**finding._asdict(), "difference": told or None})
        return {**self._asdict(), "findings": findings, "live": self.live.as_dict() if self.live else None}

    def digest(self) -> str:
        """Compute the SHA-256 of the verdict, by which the ledger names it."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def summary(self) -> str:
        """Summarise the verdict in a few words."""
        passed = sum(finding.passed for finding in self.findings)
        told = [f.said for f in self.findings if f.check.startswith("against") and f.difference]
        told += [f"{f.check} {f.said}" for f in self.findings if f.check.startswith("live")]
        return f"{passed} of {len(self.findings)} checks passed" + "".join(f"; {said}" for said in told)


def decide(
    challenger: VersionRecord,
    champion: VersionRecord | None,
    params: Promote,
    max_mean_kl: float,
    live: LiveEvidence | None = None,
) -> GateDecision:
    """Compare a version with the base model and the present champion.

    Args:
        challenger: the version.
        champion: the present champion; None when there is none.
        params: what must be shown.
        max_mean_kl: how far the model that is served may be from the one that was trained, nats per token.
        live: what a record says of both; None where there is none.
    """
    rival = champion if champion is not None and champion.version != challenger.version else None
    findings = [
        *_integrity(challenger, max_mean_kl),
        *_contamination(challenger, params),
        _against_base(challenger, params),
        *([_against_champion(challenger, rival, params)] if rival else []),
        *_guarded(challenger, rival, params),
        *_floors(challenger, params),
        *(_live(live, rival.version, params) if rival else ()),
    ]
    passed = all(finding.passed for finding in findings)
    return GateDecision(challenger.version, rival.version if rival else "", passed, findings, live)


def _integrity(version: VersionRecord, max_mean_kl: float) -> Iterator[CheckResult]:
    yield CheckResult("files", "", not version.broken, version.broken or "as they were registered")
    told = [version.templates.get(where, "") for where in ("training", "evaluation", "model")]
    same = bool(told[0]) and len(set(told)) == 1
    shown = ", ".join(f"{each[:12] or 'missing'}" for each in told)
    yield CheckResult(
        "template", "", same, f"{told[0][:12]} throughout" if same else f"training, evaluation, model: {shown}"
    )
    found = "missing" if math.isnan(version.mean_kl) else f"mean KL {version.mean_kl:.2g}"
    yield CheckResult("merge", "", version.mean_kl <= max_mean_kl, f"{found}, at most {max_mean_kl:g} nats a token")


def _contamination(version: VersionRecord, params: Promote) -> Iterator[CheckResult]:
    for suite in dict.fromkeys([params.suite, *params.guarded, *params.floors]):
        share = version.contamination.get(suite, math.nan)
        found = "not looked for" if math.isnan(share) else f"{share:.2%} of its items stand in the training rows"
        yield CheckResult(
            "contamination",
            suite,
            share <= params.max_contamination,
            f"{found}, at most {params.max_contamination:.2%}",
        )


def _against_base(version: VersionRecord, params: Promote) -> CheckResult:
    found = _on(params.suite, version.suites, version.base, params.metric, params)
    return _told("against base", params.suite, found.counted > 0, found, params.metric, "base")


def _against_champion(version: VersionRecord, champion: VersionRecord, params: Promote) -> CheckResult:
    found = _on(params.suite, version.suites, champion.suites, params.metric, params)
    return _told(
        "against champion",
        params.suite,
        _not_worse(found, params.margin, params.max_noise),
        found,
        params.metric,
        f"champion {champion.version}",
    )


def _guarded(version: VersionRecord, champion: VersionRecord | None, params: Promote) -> Iterator[CheckResult]:
    for suite, margin in params.guarded.items():
        rival, name = (champion.suites, f"champion {champion.version}") if champion else (version.base, "base")
        found = _on(suite, version.suites, rival, "score", params)
        yield _told("guarded", suite, _not_worse(found, margin, params.max_noise), found, "score", name)


def _floors(version: VersionRecord, params: Promote) -> Iterator[CheckResult]:
    for suite, floor in params.floors.items():
        items = version.suites.get(suite, {})
        mean = math.fsum(item.score for item in items.values()) / len(items) if items else math.nan
        found = "score is absent" if math.isnan(mean) else f"score {mean:.3f} of {len(items)} items"
        yield CheckResult("floor", suite, mean >= floor, f"{found}, at least {floor:g}")


def _live(live: LiveEvidence | None, champion: str, params: Promote) -> Iterator[CheckResult]:
    """Judge what a record says; a version that nobody used is held back only where that is demanded."""
    asked = params.live
    if not asked.asked:
        return
    found = live or LiveEvidence("no record", "", "")
    where = f"; {found.source}" + (f" since {found.since}" if found.since else "")
    two_groups = (
        ("thumbs", "up", asked.thumbs, found.version.thumbs, found.champion.thumbs),
        ("complete", "complete", asked.complete, found.version.complete, found.champion.complete),
    )
    for name, word, check, new, old in two_groups:
        if check.use != "ignored":
            difference = share_difference(new, old, params.resampling)
            shares = (f"{word} {_share(new, params)}", f"champion {champion} {_share(old, params)}")
            yield _live_check(name, check, min(new.units, old.units), difference, ", ".join(shares) + where, params)
    if asked.preferences.use != "ignored":
        wins = found.preferences
        said = f"preferred to champion {champion} {_share(wins, params)}{where}"
        yield _live_check(
            "preferences", asked.preferences, wins.units, preference(wins, params.resampling), said, params
        )
    if asked.min_agreement:
        enough, agreed = found.agreement.units >= asked.least, found.agreement.share >= asked.min_agreement
        said = f"as champion {champion} {_share(found.agreement, params)}, at least {asked.min_agreement:g}{where}"
        yield CheckResult("live agreement", "", enough and agreed, said if enough else f"{_few(params)}: {said}")
    yield CheckResult("live answers", "", True, f"{found.version.told()}; champion {found.champion.told()}{where}")


def _live_check(name: str, check: LiveCheck, units: int, found: Difference, said: str, params: Promote) -> CheckResult:
    demanded = check.use == "demanded"
    if units < params.live.least:
        return CheckResult(f"live {name}", "", not demanded, f"{_few(params)}: {said}", found)
    passed = _not_worse(found, check.margin, params.live.max_noise if demanded else math.inf)
    said = f"{found.gain:+.3f} [{found.low:+.3f}, {found.high:+.3f}], noise {found.noise:.3f}: {said}"
    return CheckResult(f"live {name}", "", passed, said, found)


def _few(params: Promote) -> str:
    return f"fewer than {params.live.least} users or conversations"


def _share(tally: Tally, params: Promote) -> str:
    if not tally.votes:
        return "of nothing"
    share, low, high = wilson(tally, params.confidence)
    return f"{share:.3f} [{low:.3f}, {high:.3f}] of {tally.votes} by {tally.units}"


def _not_worse(found: Difference, margin: float, max_noise: float) -> bool:
    """No loss that counts beyond the margin; where nothing counts, noise must not be what hides it. NaN is False."""
    return found.counted >= -margin and (found.counted != 0 or found.noise <= max_noise)


def _told(check: str, suite: str, passed: bool, found: Difference, metric: str, rival: str) -> CheckResult:
    if not found.items:
        said = f"no items in common with {rival}"
    elif math.isnan(found.gain):
        said = f"{metric} is absent of some of {found.items} items; the gate fails closed"
    else:
        interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
        said = (
            f"{metric} {found.new:.3f}, {rival} {found.old:.3f}: {found.gain:+.3f} {interval}, noise {found.noise:.3f}"
        )
    return CheckResult(check, suite, passed, said, found)


def _on(suite: str, new: Mapping[str, Items], old: Mapping[str, Items], metric: str, params: Promote) -> Difference:
    return compare_items(new.get(suite, {}), old.get(suite, {}), metric, params.resampling)
