"""Methods compared: the comparison page, of what there is at this moment."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from flows.comparison.collect import gather
from flows.comparison.page import COMPARISON_TEMPLATE, comparison_values
from flows.ui.site import Site, Visit


def routes(site: Site) -> list[Route]:
    """Return the page."""

    def show(visit: Visit) -> Response:
        template = COMPARISON_TEMPLATE.name.removesuffix(".html.jinja")
        return site.page(visit, template, comparison_values(gather(site.root)))

    return [site.route("/methods", show)]
