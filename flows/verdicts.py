"""Where a verdict of the gate is kept and shown: with the version in MLflow, and on the flow run in Prefect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks import version_tags as tag
from tasks.gate import Finding, Verdict
from tasks.outputs import as_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def keep_verdict(client: MlflowClient, version: ModelVersion, verdict: Verdict) -> None:
    """Stores a verdict with its version: whole as an artifact of its run and as a tag, and its digest beside it."""
    told, digest = as_json(verdict.as_dict()), verdict.digest()
    if version.run_id:
        client.log_text(version.run_id, told, f"verdicts/version-{version.version}-{digest[:12]}.json")
    for name, value in ((tag.VERDICT, told), (tag.VERDICT_DIGEST, digest)):
        client.set_model_version_tag(version.name, version.version, name, value)


def table(verdict: Verdict) -> list[dict[str, str]]:
    """A verdict as rows of text, for a terminal or a page."""
    return [_row(finding) for finding in verdict.findings]


def _row(finding: Finding) -> dict[str, str]:
    items = str(finding.difference.items) if finding.difference else ""
    return {
        "": "passed" if finding.passed else "FAILED",
        "check": finding.check,
        "suite": finding.suite,
        "items": items,
        "found": finding.said,
    }


def show_verdict(model: str, verdict: Verdict) -> None:
    """Publishes a verdict as a Prefect artifact, where a flow run is under way."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.runtime import flow_run

    if flow_run.id is None:
        return
    rows = table(verdict)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    passed = "passed" if verdict.passed else "did not pass"
    create_markdown_artifact(
        "\n".join(lines), key="verdict", description=f"Version {verdict.version} of {model} {passed} the gate"
    )
