"""Rows in quarantine: why they are there, and releasing them, as they are or edited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.review import quarantine
from flows.review.quarantine import PARAMS, RELEASED, Quarantined, texts_of
from flows.serve.keys import LABELLER
from flows.ui.site import Site, Visit
from tasks.core.errors import BadParams
from tasks.html.shell import visible

_PAGE = 20


def routes(site: Site) -> list[Route]:
    """Return the list of rows, and the page of one, whose form releases it."""

    def show(visit: Visit) -> Response:
        rows = quarantine.quarantined(site.root)
        return site.page(visit, "quarantine", listed(rows, visit.field("reason"), number_of(visit.field("page"))))

    def show_row(visit: Visit) -> Response:
        return site.page(visit, "row", row(site.root, visit.field("id")))

    def act(visit: Visit) -> Response:
        why, row_id = visit.field("why").strip(), visit.field("id")
        if not why:
            raise BadParams("a reason is missing", where=row_id, expected="why the row may be learnt from")
        by, found = visit.session.name, quarantine.find(site.root, row_id)
        if visit.field("decision") == "withdraw":
            quarantine.decide(site.root, row_id, "withdraw", by=by, why=why)
            return site.done(visit, f"{row_id} is no longer released.", "/quarantine")
        texts = as_sent(found, visit.fields.get("text", ()))
        quarantine.decide(site.root, row_id, "release", by=by, why=why, texts=texts)
        return site.done(visit, f"{row_id} is released into {RELEASED / 'rows'}.", "/quarantine")

    return [site.route("/quarantine", show), site.route("/quarantine/row", show_row, act, may=LABELLER)]


def number_of(text: str) -> int:
    """Read the number of a page, from 1; whatever is none is the first."""
    return max(1, int(text)) if text.isdecimal() and len(text) < 9 else 1


def as_sent(found: Quarantined, sent: Sequence[str]) -> list[str]:
    """Return the texts of a form, with what pages show otherwise as it is in the row.

    Browsers change line ends; a page shows control characters as pictures of them.
    """
    own = [text for _, text in texts_of(found.record)]
    return [_as_sent(old, new) for old, new in zip(own, sent, strict=True)] if len(sent) == len(own) else list(sent)


def _as_sent(old: str, new: str) -> str:
    if visible(old.replace("\r\n", "\n").replace("\r", "\n")) == new:
        return old
    for character in set(old) - {"\r"}:
        if visible(character) != character:
            new = new.replace(visible(character), character)
    return new


def listed(rows: Sequence[Quarantined], reason: str, page: int) -> dict[str, Any]:
    """Collect a page of rows, of one reason or of all, and how many there are of each reason."""
    chosen = [each for each in rows if not reason or reason in each.reasons]
    pages = max(1, -(-len(chosen) // _PAGE))
    page = min(page, pages)
    return {
        "rows": [(each, texts_of(each.record)) for each in chosen[(page - 1) * _PAGE : page * _PAGE]],
        "reasons": Counter(why for each in rows for why in each.reasons).most_common(),
        "reason": reason,
        "total": len(rows),
        "released": sum(each.released for each in rows),
        "page_number": page,
        "pages": pages,
        "params": PARAMS,
    }


def row(root: Path, row_id: str) -> dict[str, Any]:
    """Collect a row with its texts, and all decisions on it."""
    found = quarantine.find(root, row_id)
    decisions = [each for each in quarantine.decisions(root) if each.id == row_id]
    return {"row": found, "texts": texts_of(found.record), "decisions": decisions[::-1]}
