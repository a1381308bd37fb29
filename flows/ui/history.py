"""History of the champion alias, and rolling it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.registry import history as ledger
from flows.registry.promotion import rollback
from flows.serve.keys import APPROVER
from flows.ui.site import Site, Visit
from tasks.registry.alias_log import Move, champions


def routes(site: Site) -> list[Route]:
    """Return the page; its form rolls back."""

    def show(visit: Visit) -> Response:
        return site.page(visit, "history", moves(site.root))

    def act(visit: Visit) -> Response:
        with site.acting("temper ui: a rollback"):
            done = rollback(site.root, visit.field("to") or None, visit.field("reason"), by=visit.session.name)
        return site.done(visit, f"Version {done.champion} ({done.method}) is champion again.", "/history")

    return [site.route("/history", show, act, may=APPROVER)]


def moves(root: Path) -> dict[str, Any]:
    """Collect versions and moves, newest first, and the earlier champions that a rollback can go to."""
    found = ledger.history(root)
    stack = champions([Move(**move) for move in found["moves"]])
    return {
        **found,
        "moves": found["moves"][::-1],
        "versions": found["versions"][::-1],
        "earlier": list(dict.fromkeys(stack[-2::-1])) if len(stack) > 1 else [],
    }
