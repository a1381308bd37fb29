"""Moving the champion alias: forward on evidence, back in one command.

The gate compares a version with the base model and with the present champion, on the held-out rows that both
answered. It fails closed: a number that is missing, or no row in common, is a refusal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefect import flow

from tasks import graph
from tasks.errors import BadParams
from tasks.params_reading import load
from tasks.registry import (
    champions,
    find_version,
    move_champion,
    moves,
    settle_champion,
    versions,
    withdrawn,
)
from tasks.registry_params import Promote
from tasks.tracking import answering, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


METRICS = ("exact_match", "loss")


class Score(NamedTuple):
    """One model's result on one held-out row; `loss` in nats per token, over `tokens` tokens."""

    correct: bool
    loss: float
    tokens: int


class Evidence(NamedTuple):
    """What is known of a version.

    Attributes:
        version: its number.
        method: what trained it.
        own: its figures over all its held-out rows, by metric.
        base: the base model's on the same rows.
        scores: its scores by the digest of prompt and target, so that versions are compared on rows that are the same.
    """

    version: str
    method: str
    own: Mapping[str, float]
    base: Mapping[str, float]
    scores: Mapping[str, Score]


class Verdict(NamedTuple):
    """Whether a version may become champion, and why, one sentence for each comparison."""

    passed: bool
    findings: list[str]


class Promotion(NamedTuple):
    """The outcome of a promotion or rollback.

    Attributes:
        model: the registered model's name.
        champion: the version that is champion now; None when there is none yet.
        method: the champion's method.
        moved: whether the alias was moved.
        passed: whether the gate let the version through that was looked at.
        findings: why, one sentence each.
    """

    model: str
    champion: str | None
    method: str
    moved: bool
    passed: bool
    findings: list[str]


# --- the gate: pure ---------------------------------------------------------------------------------------------------


def judge(challenger: Evidence, champion: Evidence | None, params: Promote) -> Verdict:
    """Better than the base, and not worse than the champion by more than `promote.margin`."""
    own, base = (figures.get(params.metric, math.nan) for figures in (challenger.own, challenger.base))
    findings = [(_better(own, base, params.metric, 0.0, strictly=True), f"{params.metric} {own:.3f}, base {base:.3f}")]
    if champion is not None and champion.version != challenger.version:
        common = sorted(challenger.scores.keys() & champion.scores.keys())
        new, old = (figure(each.scores, common, params.metric) for each in (challenger, champion))
        what = f"{params.metric} {new:.3f}, champion {champion.version} {old:.3f} on {len(common)} common rows"
        findings.append((_better(new, old, params.metric, params.margin, strictly=False), what))
    sentences = [("passed: " if passed else "failed: ") + text for passed, text in findings]
    return Verdict(all(passed for passed, _ in findings), sentences)


def figure(scores: Mapping[str, Score], rows: Sequence[str], metric: str) -> float:
    """The metric over some rows: the share of exact matches, or the loss per token; NaN when there are no rows."""
    chosen = [scores[row] for row in rows]
    if not chosen:
        return math.nan
    if metric == "exact_match":
        return sum(score.correct for score in chosen) / len(chosen)
    return sum(score.loss * score.tokens for score in chosen) / sum(score.tokens for score in chosen)


def _better(new: float, old: float, metric: str, margin: float, *, strictly: bool) -> bool:
    """Whether `new` is better (strictly), or worse by at most `margin`; a NaN on either side is neither."""
    gain = new - old if metric == "exact_match" else old - new
    return gain > 0 if strictly else gain >= -margin


# --- the flows --------------------------------------------------------------------------------------------------------


# Prefect could not check these parameters: the names in postponed annotations mean nothing to it.
@flow(name="promote", validate_parameters=False)
def promote(workspace: Path, version: str | None = None) -> Promotion:
    """Makes a version champion if the gate lets it: the one given, or the best that this workspace registered.

    A version that was rolled back is passed over unless it is named.

    Raises:
        BadParams: there is no such version, or nothing was registered yet.
    """
    with answering(workspace):
        return _promote(workspace, version)


def _promote(workspace: Path, version: str | None) -> Promotion:
    params = load(workspace / graph.PARAMS)
    client, model = connect(workspace), params.register_.model
    present = settle_champion(client, model)
    champion = evidence(client, _version(client, model, present)) if present else None
    if version:
        chosen: Evidence | None = evidence(client, _version(client, model, version))
    else:
        chosen = _best(client, workspace, model, params.promote)
    if chosen is None:
        findings = ["there is nothing to promote: what this workspace registered was all rolled back"]
        return Promotion(model, present, champion.method if champion else "", False, False, findings)
    if champion and chosen.version == champion.version:
        return Promotion(model, champion.version, champion.method, False, True, ["it is champion already"])
    verdict = judge(chosen, champion, params.promote)
    client.set_model_version_tag(model, chosen.version, "temper.verdict", json.dumps(verdict._asdict()))
    findings = [f"version {chosen.version} ({chosen.method}) {finding}" for finding in verdict.findings]
    if verdict.passed:
        move_champion(client, model, "promote", chosen.version)
        return Promotion(model, chosen.version, chosen.method, True, True, findings)
    return Promotion(model, present, champion.method if champion else "", False, False, findings)


@flow(name="rollback", validate_parameters=False)
def rollback(workspace: Path) -> Promotion:
    """Makes the champion before the present one champion again.

    Raises:
        BadParams: there was none before.
    """
    with answering(workspace):
        return _rollback(workspace)


def _rollback(workspace: Path) -> Promotion:
    client, model = connect(workspace), load(workspace / graph.PARAMS).register_.model
    settle_champion(client, model)
    stack = champions(moves(client, model))
    if len(stack) < 2:
        raise BadParams("no earlier champion to roll back to", where=model, got=f"{len(stack)} champions so far")
    move_champion(client, model, "rollback", stack[-2])
    method = _version(client, model, stack[-2]).tags.get("temper.method", "")
    return Promotion(model, stack[-2], method, True, True, [f"version {stack[-1]} was champion before"])


# --- what the registry knows ------------------------------------------------------------------------------------------


def evidence(client: MlflowClient, version: ModelVersion) -> Evidence:
    """What was registered with a version; a figure that is missing is NaN, which passes no gate."""
    import tempfile

    from mlflow.exceptions import MlflowException

    from tasks.items import EXAMPLES, HELD_OUT
    from tasks.tables import read_rows

    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = read_rows(Path(client.download_artifacts(str(version.run_id), f"report/{EXAMPLES}", folder)))
        except MlflowException as error:
            raise BadParams(
                f"the report of version {version.version} cannot be read, so nothing can be compared with it",
                where=version.name,
                got=str(error).split("\n")[0],
                fix="bring back MLflow's artifacts, or take register.model to a new name",
            ) from error
    tags = version.tags
    return Evidence(
        version=str(version.version),
        method=tags.get("temper.method", ""),
        own={metric: float(tags.get(f"temper.{metric}", "nan")) for metric in METRICS},
        base={metric: float(tags.get(f"temper.base_{metric}", "nan")) for metric in METRICS},
        scores={
            _digest(row["prompt"], row["target"]): Score(row["score"] == 1, -row["logp"] / row["tokens"], row["tokens"])
            for row in rows
            if row["suite"] == HELD_OUT
        },
    )


def _digest(prompt: str, target: str) -> str:
    return hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()


def _version(client: MlflowClient, model: str, number: str) -> ModelVersion:
    known = versions(client, model)
    found = next((v for v in known if str(v.version) == str(number)), None)
    if found is None:
        raise BadParams(
            f"version {number} does not exist",
            where=model,
            expected=", ".join(str(v.version) for v in known) or "a registered version",
        )
    return found


def _best(client: MlflowClient, workspace: Path, model: str, params: Promote) -> Evidence | None:
    """The best of what the workspace's methods registered last, leaving out what was rolled back."""
    rolled_back = withdrawn(moves(client, model))
    found = [v for v in (find_version(client, model, key) for key in _registered_keys(workspace)) if v is not None]
    if not found:
        raise BadParams(
            "nothing is registered yet", where=model, fix="run `temper run`, or name a version with --version"
        )
    candidates = [evidence(client, v) for v in found if str(v.version) not in rolled_back]
    sign = 1 if params.metric == "exact_match" else -1

    def rank(each: Evidence) -> tuple[float, float]:
        value, loss = sign * each.own[params.metric], -each.own["loss"]
        return (-math.inf if math.isnan(value) else value, -math.inf if math.isnan(loss) else loss)

    return max(candidates, key=rank, default=None)


def _registered_keys(workspace: Path) -> list[str]:
    files = [workspace / node.outs[0] for name, node in graph.load(workspace).items() if name.startswith("register@")]
    return [json.loads(file.read_text())["key"] for file in files if file.is_file()]
