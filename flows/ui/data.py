"""The data: what `validate` measured of it last, and how far it has moved since the run before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flows.run.data_page import NUMBERS, logged_drift
from flows.ui.site import Site, Visit
from tasks.validate.profile import profile_values


def routes(site: Site) -> list[Route]:
    """Return the page."""

    def show(visit: Visit) -> Response:
        values = profile(site.root)
        return site.page(visit, "data" if values else "nothing_validated", values)

    return [site.route("/data", show)]


def profile(root: Path) -> dict[str, Any]:
    """Collect the profile and its drift; empty where nothing was validated yet."""
    file = root / NUMBERS
    return profile_values(json.loads(file.read_text()), logged_drift(root)) if file.is_file() else {}
