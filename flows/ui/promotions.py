"""Promotions: the evidence on each version, and the word of somebody who has seen it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.registry import history
from flows.registry.promotion import judge, promote, refuse
from flows.registry.verdict import verdict_table
from flows.registry.waiting import Waiting, waiting
from flows.review.side_by_side import pairs, preferred, tally
from flows.serve.keys import APPROVER
from flows.serve.record import Record
from flows.ui.site import Site, Visit
from tasks.core.errors import BadParams, TemperError, Transient

_WAIT_S = 180


def routes(site: Site) -> list[Route]:
    """Return the list of versions, and the page of each, whose buttons approve and refuse."""

    def show(visit: Visit) -> Response:
        return site.page(visit, "promotions", {**history.history(site.root), "waiting": waiting(site.root)})

    def show_one(visit: Visit) -> Response:
        version = str(visit.request.path_params["version"])
        return site.page(visit, "promotion", evidence(site.root, version, site.service.record))

    def act(visit: Visit) -> Response:
        version, why = str(visit.request.path_params["version"]), visit.field("reason").strip()
        approved = visit.field("decision") == "approve"
        if not why:
            raise BadParams("a reason is missing", where=f"version {version}", expected="why, for the ledger")
        said = decide(site, version, approved=approved, why=why, by=visit.session.name)
        return site.done(visit, said, "/history")

    return [
        site.route("/promotions", show),
        site.route("/promotions/{version:int}", show_one, act, may=APPROVER),
    ]


def evidence(root: Path, version: str, record: Record | None) -> dict[str, Any]:
    """Collect all that speaks for and against a version.

    Returns:
        `model`, `version`, `champion`; `verdict`, of the gate at this moment, and `checks`, its rows of text;
        `comparison` with the champion and `votes` between the two, where there is another champion; `lineage`, where it
        was registered with one; `waits`, the flow run that waits for a word on it, or None.
    """
    verdict = judge(root, version, record.url if record else None)
    found = history.history(root)
    champion, between = found["champion"], None
    rival = champion if champion and champion != version else None
    if rival and record:
        both = pairs(root, rival, version)
        between = tally(preferred(record.votes(), both), (rival, version))
    try:
        lineage = history.lineage(root, version)
    except BadParams:  # one that was made by hand has none
        lineage = None
    return {
        "model": found["model"],
        "version": version,
        "about": next(each for each in found["versions"] if each["version"] == version),
        "champion": champion,
        "verdict": verdict,
        "checks": verdict_table(verdict),
        "comparison": history.compare(root, rival, version) if rival else None,
        "votes": between,
        "lineage": lineage,
        "waits": next((each for each in waiting(root) if each.version == version), None),
    }


def decide(site: Site, version: str, *, approved: bool, why: str, by: str) -> str:
    """Carry out a person's word on a version; return what was done, in one sentence.

    Raises:
        TemperError: the gate, the ledger or the run that waits refuses it.
    """
    if waits := next((each for each in waiting(site.root) if each.version == version), None):
        _answer(site.root, waits, approved=approved, why=why, by=by)
        return f"Version {version}: {'approved' if approved else 'refused'}; the promotion that waited goes on."
    with site.acting("temper ui: a promotion"):
        if not approved:
            refuse(site.root, version, why, by)
            return f"Version {version} is refused."
        record = site.service.record
        done = promote(site.root, version, why, record=record.url if record else None, approver=by)
    if done.moved:
        return f"Version {done.champion} ({done.method}) is champion now."
    return f"Version {version} did not pass the gate." if done.verdict else "; ".join(done.findings)


def _answer(root: Path, waits: Waiting, *, approved: bool, why: str, by: str) -> None:
    """Let `temper approve` answer a run, in a process of its own: it may have to start a Prefect server."""
    words = ["approve", waits.run, "--note", why, "--by", by, *([] if approved else ["--refuse"])]
    command = [sys.executable, "-m", "flows.cli", *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_WAIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Transient(
            "the run that waits was not reached", where=waits.run, got=f"no answer in {_WAIT_S} s"
        ) from error
    if done.returncode:
        raise TemperError("the run that waits was not answered", where=waits.run, got=done.stderr.strip())
