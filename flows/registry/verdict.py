"""The gate's verdict: kept with the version in MLflow, and as rows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.artifacts import as_json
from tasks.gate.checks import CheckResult, GateDecision
from tasks.registry import names as tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


TAG_CHARACTERS = 100_000
"""MLflow takes no longer value of a version's tag."""


def keep_verdict(client: MlflowClient, version: ModelVersion, verdict: GateDecision) -> None:
    """Store a verdict with its version: whole as an artifact of its run and as a tag, and its digest beside it.

    A tag has no room for the tallies of very many users; what was found of them it always has.
    """
    told, digest = as_json(verdict.as_dict()), verdict.digest()
    if version.run_id:
        client.log_text(version.run_id, told, f"verdicts/version-{version.version}-{digest[:12]}.json")
    if len(told) > TAG_CHARACTERS:
        told = as_json(verdict._replace(live=None).as_dict())
    for name, value in ((tag.VERDICT, told), (tag.VERDICT_DIGEST, digest)):
        client.set_model_version_tag(version.name, version.version, name, value)


def verdict_table(verdict: GateDecision) -> list[dict[str, str]]:
    """Format a verdict as rows of text, for a terminal or a page."""
    return [_row(finding) for finding in verdict.findings]


def _row(finding: CheckResult) -> dict[str, str]:
    items = str(finding.difference.items) if finding.difference else ""
    return {
        "": "passed" if finding.passed else "FAILED",
        "check": finding.check,
        "suite": finding.suite,
        "items": items,
        "found": finding.said,
    }
