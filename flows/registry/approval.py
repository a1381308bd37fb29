"""A person's word before a version becomes champion, and the gate's verdict on the flow run's page.

On that page in Prefect's UI, Resume asks for the two fields below; `temper approve` does the same.
"""

from __future__ import annotations

from pathlib import Path

from prefect.input import RunInput

from flows.registry.verdict import verdict_table
from flows.registry.waiting import noted
from tasks.core.errors import BadParams, GateRefused
from tasks.gate.checks import GateDecision


class Approval(RunInput):
    """Decision of a person on a version that passed the gate."""

    approved: bool
    note: str = ""
    by: str = ""

    def reason(self) -> str:
        """Return who decided and why, as the ledger has it."""
        who = f"{'approved' if self.approved else 'refused'} by {self.by}" if self.by else ""
        return "; ".join(each for each in (who, self.note) if each)


POLL_S = 2


def await_approval(workspace: Path, model: str, verdict: GateDecision, timeout_s: int) -> Approval:
    """Pause this flow run until somebody approves of a version or refuses it.

    Args:
        workspace: where it is noted that a run waits.
        model: the registered model's name.
        verdict: of the version.
        timeout_s: how long it waits, in seconds.

    Raises:
        BadParams: this is no flow run, so there is nothing that could be resumed.
        GateRefused: nobody decided in time.
    """
    from prefect.exceptions import FlowPauseTimeout
    from prefect.flow_runs import pause_flow_run
    from prefect.runtime import flow_run

    if flow_run.id is None:
        raise BadParams("promote.approval is human, which needs a flow run", fix="start it with `temper promote`")
    asked = Approval.with_initial_data(description=f"Version {verdict.version} of {model}: {verdict.summary()}")
    print(f"waiting for approval: temper approve {flow_run.id}, or Resume on its page in Prefect", flush=True)
    try:
        with noted(workspace, str(flow_run.id), model, verdict):
            return pause_flow_run(wait_for_input=asked, timeout=timeout_s, poll_interval=POLL_S)
    except FlowPauseTimeout as error:
        raise GateRefused(
            f"nobody approved of version {verdict.version} within {timeout_s} s",
            where=model,
            fix="promote it again; promote.approval_timeout_s says how long it waits",
        ) from error


def approve(run: str, *, approved: bool, note: str, by: str = "") -> None:
    """Resume a flow run that waits for a person's decision.

    Args:
        run: its id.
        approved: the decision.
        note: why, for the ledger.
        by: who decided.

    Raises:
        BadParams: there is no such run, or it does not wait.
    """
    from uuid import UUID

    from prefect.exceptions import FlowPauseTimeout, NotPausedError, ObjectNotFound
    from prefect.flow_runs import resume_flow_run

    try:
        resume_flow_run(UUID(run), run_input={"approved": approved, "note": note, "by": by})
    except ValueError as error:
        raise BadParams("is no id of a flow run", got=run, fix="`temper promote` prints it") from error
    except (NotPausedError, ObjectNotFound, FlowPauseTimeout) as error:
        raise BadParams("waits for nobody's approval", where=f"flow run {run}", got=type(error).__name__) from error


def show_verdict(model: str, verdict: GateDecision) -> None:
    """Publish a verdict as a Prefect artifact, where a flow run is under way."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.runtime import flow_run

    if flow_run.id is None:
        return
    rows = verdict_table(verdict)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    passed = "passed" if verdict.passed else "did not pass"
    create_markdown_artifact(
        "\n".join(lines), key="verdict", description=f"Version {verdict.version} of {model} {passed} the gate"
    )
