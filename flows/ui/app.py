"""The pages, put beside the API on one app."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from flows.serve.errors import ApiError
from flows.serve.exchange import Service
from flows.ui import chat, compare, data, history, methods, promotions, quarantine, runs
from flows.ui.site import COOKIE, PREFIX, Site, Visit, check_site, fields_of, secured

_STATIC = Path(__file__).parent / "static"
_FILES = ("htmx.min.js", "icon.svg", "keys.js")
PAGES = (runs, methods, compare, chat, promotions, quarantine, history, data)


def add_pages(root: Path, app: FastAPI, service: Service) -> str:
    """Put the pages of a workspace on the app of a server; return their path."""
    site = Site(root, service)
    routes = [route for page in PAGES for route in page.routes(site)]
    routes += [
        Route("/login", partial(_login, site), methods=["GET", "POST"]),
        site.route("/logout", lambda _: RedirectResponse(f"{PREFIX}/login"), partial(_logout, site)),
        Route("/style.css", partial(_style, site)),
        *(Route(f"/{name}", partial(_file, name)) for name in _FILES),
    ]
    app.mount(PREFIX, Starlette(routes=routes, exception_handlers={404: partial(_nowhere, site)}))
    app.router.routes.append(Route("/", _home))
    return PREFIX


async def _home(_: Request) -> Response:
    return RedirectResponse(f"{PREFIX}/")


async def _login(site: Site, request: Request) -> Response:
    """Ask for a key, and begin a session with it."""
    error, status = "", HTTPStatus.OK
    if request.method == "POST":
        try:
            check_site(request)
            fields = await fields_of(request, site.service.max_body_bytes)
            token = site.sessions.begin((fields.get("key") or [""])[-1].strip())
        except ApiError as refused:
            error, status = refused.message, HTTPStatus(refused.status)
        else:
            answer = RedirectResponse(f"{PREFIX}/", HTTPStatus.SEE_OTHER)
            secure = request.url.scheme == "https"
            answer.set_cookie(COOKIE, token, path=PREFIX, httponly=True, samesite="strict", secure=secure)
            return secured(answer)
    return secured(HTMLResponse(site.render("login", None, request.url.path, {"error": error}), status))


def _logout(site: Site, visit: Visit) -> Response:
    """End the session."""
    site.sessions.end(visit.request.cookies.get(COOKIE))
    answer = RedirectResponse(f"{PREFIX}/login", HTTPStatus.SEE_OTHER)
    answer.delete_cookie(COOKIE, path=PREFIX)
    return answer


async def _style(site: Site, _: Request) -> Response:
    return secured(Response(site.stylesheet(), media_type="text/css"))


async def _file(name: str, _: Request) -> Response:
    return secured(FileResponse(_STATIC / name))


async def _nowhere(site: Site, request: Request, _: Exception) -> Response:
    return site.failed(request, None, ApiError(HTTPStatus.NOT_FOUND, "There is no such page."))
