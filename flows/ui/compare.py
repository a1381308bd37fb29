"""Two versions side by side on the items that they answered differently; which is which is told after the vote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.comparison.page import shown
from flows.registry.history import history
from flows.review.side_by_side import Pair, pairs, preferred, tally, vote
from flows.serve.keys import LABELLER
from flows.serve.record import Record
from flows.ui.site import PREFIX, Site, Visit
from tasks.core.errors import BadParams


def routes(site: Site) -> list[Route]:
    """Return the page; its form votes."""

    def show(visit: Visit) -> Response:
        values = question(
            site.root, site.service.record, visit.session.name, *_asked(site.root, visit), visit.field("after")
        )
        return site.page(visit, "_compare" if visit.partial else "compare", values)

    def act(visit: Visit) -> Response:
        first, second = _asked(site.root, visit)
        name, better = visit.field("item"), visit.field("better")
        pair = next((each for each in pairs(site.root, first, second) if each.name == name), None)
        if pair is None:
            raise BadParams("the two versions answered no such item differently", got=name)
        vote(site.record, pair, better, visit.session.name)
        site.service.metrics.feedback.labels("preferred_over").inc()
        if not visit.partial:
            said = f"You preferred version {better}."
            return site.done(visit, said, f"/compare?first={first}&second={second}")
        values = question(site.root, site.record, visit.session.name, first, second, name)
        return site.page(visit, "_compare", {**values, "voted": pair, "better": better})

    return [site.route("/compare", show, act, may=LABELLER)]


def _asked(root: Path, visit: Visit) -> tuple[str, str]:
    """Return the two versions that are compared: those that are asked for, else the champion and the newest other."""
    if visit.field("first") and visit.field("second"):
        return visit.field("first"), visit.field("second")
    found = history(root)
    numbers = [each["version"] for each in found["versions"]][::-1]
    first = found["champion"] or next(iter(numbers), "")
    return first, next((number for number in numbers if number != first), "")


def question(root: Path, record: Record | None, name: str, first: str, second: str, after: str = "") -> dict[str, Any]:
    """Collect the next item that somebody has not voted on, and how the votes stand.

    Args:
        root: the workspace.
        record: where votes are kept.
        name: who votes.
        first: the number of a version.
        second: of the other.
        after: the item that was shown last, which is followed by the next one in order.

    Returns:
        `versions` of the model; `first`, `second`; `pair`, or None where nothing is left, and its `sides`, the
        versions from left to right; `tally`; `left`, how many items are not voted on; `expected`, to be shown later.
    """
    found = history(root)
    values = {"versions": found["versions"], "first": first, "second": second, "pair": None, "shown": shown}
    if len(found["versions"]) < 2:
        return {**values, "few": True}
    both = pairs(root, first, second)
    votes = preferred(record.votes(), both) if record else {}
    places = {each.name: place for place, each in enumerate(both)}
    start = places.get(after, -1) + 1
    open_ones = [each for each in [*both[start:], *both[:start]] if name not in votes.get(each.name, {})]
    pair = next(iter(open_ones), None)
    return {
        **values,
        "pair": pair,
        "sides": sides(pair, name) if pair else (),
        "tally": tally(votes, (first, second)),
        "left": len(open_ones),
        "total": len(both),
        "action": f"{PREFIX}/compare",
        "kept": record is not None,
    }


def sides(pair: Pair, name: str) -> tuple[str, ...]:
    """Return the two versions from left to right: for each item and voter the same order, which tells nothing."""
    numbers = tuple(pair.answers)
    turned = hashlib.sha256(f"{pair.name} {name}".encode()).digest()[0] % 2
    return numbers[::-1] if turned else numbers
