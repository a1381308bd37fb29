"""The data: what `validate` measured of it last, and how far it has moved since the run before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.run.data_page import NUMBERS, logged_drift
from flows.serve.drift import LEAST, drift_of, drifted
from flows.serve.record import Record
from flows.ui.site import Site, Visit
from tasks.core.errors import BadParams
from tasks.validate.profile import profile_values


def routes(site: Site) -> list[Route]:
    """Return the page."""

    def show(visit: Visit) -> Response:
        values = profile(site.root, site.service.record)
        return site.page(visit, "data" if values else "nothing_validated", values)

    return [site.route("/data", show)]


def profile(root: Path, record: Record | None = None) -> dict[str, Any]:
    """Collect the profile, its drift, and that of what was asked since; empty where nothing was validated yet."""
    file = root / NUMBERS
    if not file.is_file():
        return {}
    return profile_values(json.loads(file.read_text()), logged_drift(root), _live(root, record) if record else None)


def _live(root: Path, record: Record) -> dict[str, Any] | None:
    try:
        found = drift_of(root, record.url)
    except BadParams:  # an earlier temper validated the data, and did not look at prompts by themselves
        return None
    return {**found.as_dict(), "least": LEAST, "reasons": drifted(found)}
