"""Moving the champion alias: forward on evidence, back in one command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows.registry.evidence import broken, evidence
from flows.registry.verdict import keep_verdict
from tasks.core import pipeline
from tasks.core.errors import BadModel, BadParams, GateRefused
from tasks.gate.checks import GateDecision, VersionRecord, decide
from tasks.gate.live import LiveEvidence
from tasks.gate.params import Promote
from tasks.orchestration.params import Params, load_params
from tasks.registry import names as tag
from tasks.registry.alias_log import Move, champion_of, champions, move_champion, moves, settle_champion, withdrawn
from tasks.registry.client import answering, connect
from tasks.registry.versions import find_version, version_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from sqlalchemy import URL


class Promotion(NamedTuple):
    """The outcome of a promotion or rollback.

    Attributes:
        model: the registered model's name.
        champion: the version that is champion now; None when there is none yet.
        method: the champion's method.
        moved: whether the alias was moved.
        passed: whether the version that was looked at may be champion.
        findings: what else is to be said, one sentence each.
        verdict: the gate's, where it was asked.
    """

    model: str
    champion: str | None
    method: str
    moved: bool
    passed: bool
    findings: list[str]
    verdict: GateDecision | None = None


def promote(
    workspace: Path,
    version: str | None = None,
    reason: str = "",
    show: Callable[[str, GateDecision], None] = lambda model, verdict: None,
    record: str | URL | None = None,
    approver: str = "",
) -> Promotion:
    """Make a version champion if the gate lets it: the one given, or the best that this workspace registered.

    A version that was rolled back or refused is passed over unless it is named.

    Args:
        workspace: whose registry it is.
        version: its number.
        reason: the user's, for the ledger.
        show: is told the model and the gate's verdict, before anybody is asked to approve.
        record: the file or database that `temper serve --record` keeps; without it, that of TEMPER_RECORD. It is read
            where `promote.live` asks for something.
        approver: who has seen the evidence and approves; nobody else is asked, and the ledger names them.

    Raises:
        BadParams: there is no such version, nothing was registered yet, or there is no such record.
        AliasMoved: somebody else moved the alias while this version was judged.
        GateRefused: nobody approved of it in time.
    """
    with answering(workspace):
        return _promote(workspace, version, reason, show, record, approver)


def _promote(
    workspace: Path,
    version: str | None,
    reason: str,
    show: Callable[[str, GateDecision], None],
    record: str | URL | None,
    approver: str,
) -> Promotion:
    params = load_params(workspace / pipeline.PARAMS)
    client, model = connect(workspace), params.register_.model
    present = settle_champion(client, model)
    seen = moves(client, model)  # what is decided below is decided on this
    champion = evidence(client, version_of(client, model, present)) if present else None
    method = champion.method if champion else ""
    chosen = _chosen(client, workspace, params, version, withdrawn(seen))
    if chosen is None:
        findings = ["there is nothing to promote: what this workspace registered was all rolled back or refused"]
        return Promotion(model, present, method, False, False, findings)
    if present == chosen.version:
        return Promotion(model, present, method, False, True, ["it is champion already"])
    challenger = version_of(client, model, chosen.version)
    verdict = _judged(client, challenger, chosen, champion, params, record)
    keep_verdict(client, challenger, verdict)
    show(model, verdict)
    if not verdict.passed:
        return Promotion(model, present, method, False, False, [], verdict)
    about = {"verdict": verdict.digest(), "summary": verdict.summary()}
    if params.promote.approval == "human" and not approver:
        from flows.registry.approval import await_approval

        approval = await_approval(workspace, model, verdict, params.promote.approval_timeout_s)
        reason = "; ".join(each for each in (reason, approval.reason()) if each)
        if not approval.approved:
            move_champion(client, model, seen, "refuse", chosen.version, reason=reason, **about)
            said = f"version {chosen.version} was not approved" + (f": {approval.note}" if approval.note else "")
            return Promotion(model, present, method, False, False, [said], verdict)
    move_champion(client, model, seen, "promote", chosen.version, reason=reason, by=approver, **about)
    return Promotion(model, chosen.version, chosen.method, True, True, [], verdict)


def judge(workspace: Path, version: str, record: str | URL | None = None) -> GateDecision:
    """Hold a version against the base and the present champion, as a promotion would, and leave everything as it is.

    Args:
        workspace: whose registry it is.
        version: its number.
        record: as `promote` reads it.

    Raises:
        BadParams: there is no such version, or its report cannot be read.
    """
    with answering(workspace):
        params, client = load_params(workspace / pipeline.PARAMS), connect(workspace)
        model = params.register_.model
        present = champion_of(client, model)
        champion = evidence(client, version_of(client, model, present)) if present else None
        challenger = version_of(client, model, version)
        return _judged(client, challenger, evidence(client, challenger), champion, params, record)


def _judged(
    client: MlflowClient,
    version: ModelVersion,
    found: VersionRecord,
    champion: VersionRecord | None,
    params: Params,
    record: str | URL | None,
) -> GateDecision:
    whole = found._replace(broken=broken(client, version))
    live = _live(version.name, found.version, champion.version, params.promote, record) if champion else None
    return decide(whole, champion, params.promote, params.merge.max_mean_kl, live)


def refuse(workspace: Path, version: str, reason: str = "", by: str = "") -> Move:
    """Write into the ledger that a version is not to be champion; it is passed over from then on unless it is named.

    Raises:
        BadParams: there is no such version, or it is champion.
        AliasMoved: somebody else wrote an entry meanwhile.
    """
    with answering(workspace):
        client, model = connect(workspace), load_params(workspace / pipeline.PARAMS).register_.model
        seen = moves(client, model)
        chosen = version_of(client, model, version)
        if champions(seen)[-1:] == [version]:
            raise BadParams("is champion already", where=f"{model}, version {version}", fix="use `temper rollback`")
        about = {"verdict": chosen.tags.get(tag.VERDICT_DIGEST, "")}
        return move_champion(client, model, seen, "refuse", version, reason=reason, by=by, **about)


def rollback(workspace: Path, to: str | None = None, reason: str = "", by: str = "") -> Promotion:
    """Make an earlier champion champion again: the one before the present one, or the one given.

    Args:
        workspace: whose registry it is.
        to: an earlier champion.
        reason: the user's, for the ledger.
        by: who decided; without it the user of this process.

    Raises:
        BadParams: there is no such version, or none before.
        GateRefused: the version was never champion.
        BadModel: its files are not what was registered.
        AliasMoved: somebody else moved the alias meanwhile.
    """
    with answering(workspace):
        return _rollback(workspace, to, reason, by)


def _rollback(workspace: Path, to: str | None, reason: str, by: str) -> Promotion:
    client, model = connect(workspace), load_params(workspace / pipeline.PARAMS).register_.model
    seen = moves(client, model)
    stack = champions(seen)
    if to is not None:
        version_of(client, model, to)
        if to not in stack[:-1]:
            raise GateRefused(
                f"version {to} {_why_not(to, stack, seen)}",
                where=model,
                expected=" or ".join(dict.fromkeys(stack[:-1])) or "a version that the gate let through",
                fix="`temper promote --version N` puts a version through the gate",
            )
    elif len(stack) < 2:
        raise BadParams(
            "no earlier version to roll back to", where=model, got=f"{len(stack)} champions so far: {', '.join(stack)}"
        )
    chosen = version_of(client, model, to or stack[-2])
    if wrong := broken(client, chosen):
        raise BadModel("its files are not what was registered", where=f"{model}, version {chosen.version}", got=wrong)
    move_champion(client, model, seen, "rollback", str(chosen.version), reason=reason, by=by)
    method = chosen.tags.get(tag.METHOD, "")
    return Promotion(model, str(chosen.version), method, True, True, [f"version {stack[-1]} was champion before"])


def _why_not(version: str, stack: Sequence[str], seen: Sequence[Move]) -> str:
    """Why a rollback does not go to a version."""
    if stack[-1:] == [version]:
        return "is champion already"
    return "was rolled back or refused itself" if version in withdrawn(seen) else "was not champion before"


def _live(model: str, version: str, champion: str, params: Promote, record: str | URL | None) -> LiveEvidence | None:
    """Read what people said of two versions, if it is asked for and there is a record."""
    if not params.live.asked:
        return None
    from flows.registry.live import read_live_evidence
    from flows.serve.record_database import url_given

    place = url_given(record) if record is None or isinstance(record, str) else record
    days = params.live.days
    return read_live_evidence(place, f"{model}/{version}", f"{model}/{champion}", days) if place else None


# --- which version ----------------------------------------------------------------------------------------------------


def _chosen(
    client: MlflowClient, workspace: Path, params: Params, version: str | None, rolled_back: set[str]
) -> VersionRecord | None:
    """Choose the version that is named, or the best of what the workspace's methods registered last."""
    model = params.register_.model
    if version is not None:
        return evidence(client, version_of(client, model, version))
    found = [
        v for v in (find_version(client, model, key) for key in registration_notes(workspace).values()) if v is not None
    ]
    if not found:
        raise BadParams(
            "nothing is registered yet", where=model, fix="run `temper run`, or name a version with --version"
        )
    candidates = [evidence(client, v) for v in found if str(v.version) not in rolled_back]
    return max(candidates, key=lambda each: figure(each, params.promote), default=None)


def figure(version: VersionRecord, params: Promote) -> float:
    """Return the figure versions are ranked by: the mean deciding metric, higher is better; -infinity without one."""
    items = version.suites.get(params.suite, {}).values()
    tokens = sum(item.tokens for item in items)
    if params.metric == "score" and items:
        found = math.fsum(item.score for item in items) / len(items)
    else:
        found = math.fsum(item.logp for item in items) / tokens if tokens else math.nan
    return -math.inf if math.isnan(found) else found


def registration_notes(workspace: Path) -> dict[Path, str]:
    """Read the notes of this workspace's registrations, as far as there are any: the content key by the note's file."""
    files = [
        workspace / node.outs[0] for name, node in pipeline.load(workspace).items() if name.startswith("register@")
    ]
    return {file: json.loads(file.read_text())["key"] for file in files if file.is_file()}
