"""What all pages have in common: who asks, what they may, forms, errors, headers and the shell around each page."""

from __future__ import annotations

import inspect
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from flows.comparison.page import COMPARISON_TEMPLATE
from flows.run.lock import held
from flows.serve.errors import ApiError, place_of
from flows.serve.exchange import Service
from flows.serve.keys import VIEWER
from flows.serve.record import Record
from flows.ui.sessions import Session, Sessions
from tasks.core.errors import BadInput, TemperError, WorkspaceBusy
from tasks.html.shell import LIGHT_SERIES, environment, visible
from tasks.validate.profile import PROFILE_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "/ui"
COOKIE = "temper_session"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""What a browser may do with a page: load this server's own files, and ask nobody else."""

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FOLDER = Path(__file__).parent
_MOST_FIELDS = 4096

NAVIGATION: Sequence[tuple[str, str]] = (
    ("/", "Runs"),
    ("/methods", "Methods"),
    ("/compare", "Side by side"),
    ("/chat", "Chat"),
    ("/promotions", "Promotions"),
    ("/quarantine", "Quarantine"),
    ("/history", "History"),
    ("/data", "Data"),
)


class Visit(NamedTuple):
    """A request, with whose it is and what its form or address says."""

    request: Request
    session: Session
    fields: Mapping[str, Sequence[str]]

    def field(self, name: str) -> str:
        """Return a field's last value; empty where it is not there."""
        return (self.fields.get(name) or [""])[-1]

    @property
    def partial(self) -> bool:
        """Whether htmx asks, which puts the answer into the page that is there."""
        return "hx-request" in self.request.headers


Answer = Response | Awaitable[Response]
Handler = Callable[[Visit], Answer]


class Site:
    """What pages need of the server.

    Args:
        root: the workspace.
        service: what the API's requests share.
    """

    def __init__(self, root: Path, service: Service) -> None:
        self.root, self.service = root, service
        self.sessions = Sessions(service.gate)
        self._acting = threading.Lock()
        self._notices: dict[str, str] = {}
        self._templates = environment(_FOLDER / "templates", COMPARISON_TEMPLATE.parent, PROFILE_TEMPLATE.parent)
        self._templates.globals |= {
            "prefix": PREFIX,
            "navigation": NAVIGATION,
            "series_colours": len(LIGHT_SERIES),
            "open": service.gate.open,
        }

    @property
    def record(self) -> Record:
        """Where votes are kept.

        Raises:
            ApiError: nowhere.
        """
        if self.service.record is None:
            raise ApiError(HTTPStatus.CONFLICT, "This server keeps no record: start it with --record.")
        return self.service.record

    @contextmanager
    def acting(self, purpose: str) -> Iterator[None]:
        """Hold the workspace for one action at a time, within this block.

        Raises:
            WorkspaceBusy: another action, or another process, holds it.
        """
        if not self._acting.acquire(blocking=False):
            raise WorkspaceBusy("another action is under way", fix="try again when it has ended")
        try:
            with held(self.root, purpose):
                yield
        finally:
            self._acting.release()

    # --- responses ----------------------------------------------------------------------------------------------------

    def page(self, visit: Visit, template: str, values: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
        """Render a page, or the part of one that htmx asks for."""
        return HTMLResponse(self.render(template, visit.session, visit.request.url.path, values), status)

    def render(self, template: str, session: Session | None, path: str, values: Mapping[str, Any]) -> str:
        """Render a template; the shell shows who is logged in, and once what was done last."""
        about = {
            "session": session,
            "path": path.removeprefix(PREFIX) or "/",
            "notice": self._notices.pop(session.csrf, "") if session and not template.startswith("_") else "",
        }
        return visible(self._templates.get_template(f"{template}.html.jinja").render({**values, **about}))

    def stylesheet(self) -> str:
        """Render the one stylesheet of all pages."""
        parts = ("page.css.jinja", "comparison.css.jinja", "ui.css.jinja")
        return "\n".join(self._templates.get_template(part).render() for part in parts)

    def done(self, visit: Visit, notice: str, path: str) -> Response:
        """Go on to a page, which says what was done."""
        self._notices[visit.session.csrf] = notice
        return RedirectResponse(PREFIX + path, HTTPStatus.SEE_OTHER)

    # --- requests -----------------------------------------------------------------------------------------------------

    def route(
        self, path: str, show: Handler, act: Handler | None = None, *, may: str = VIEWER, look: str = ""
    ) -> Route:
        """Build the route of a page.

        Args:
            path: below the prefix.
            show: answers GET.
            act: answers POST, whose form carries the session's token.
            may: the role that `act` needs.
            look: the role that `show` needs, if it is another than that of a viewer.
        """

        async def answer(request: Request) -> Response:
            posted = request.method == "POST"
            handler, role = (act or show, may) if posted else (show, look or VIEWER)
            return await self._answer(request, handler, role)

        return Route(path, answer, methods=["GET", "POST"] if act else ["GET"])

    async def _answer(self, request: Request, handler: Handler, role: str) -> Response:
        session: Session | None = None
        try:
            session = self.sessions.find(request.cookies.get(COOKIE), request.headers.get("host"))
            if session is None:
                return _to_login(request)
            if not session.may(role):
                raise ApiError(HTTPStatus.FORBIDDEN, f"This needs the role {role}; {session.name} is {session.role}.")
            visit = Visit(request, session, await fields_of(request, self.service.max_body_bytes))
            if request.method == "POST":
                check_token(visit)
            return secured(await _called(handler, visit))
        except (ApiError, TemperError) as error:
            return self.failed(request, session, error)
        except Exception as error:
            self.service.say(f"{request.url.path} failed: {place_of(error)}")
            return self.failed(
                request, session, ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "This page failed; see the log.")
            )

    def failed(self, request: Request, session: Session | None, error: ApiError | TemperError) -> Response:
        """Say what is wrong, as a page or as the part that htmx shows."""
        if isinstance(error, ApiError):
            status, lines = error.status, [error.message]
        else:
            status = HTTPStatus.BAD_REQUEST if isinstance(error, BadInput) else HTTPStatus.SERVICE_UNAVAILABLE
            lines = str(error).splitlines()
        template = "_error" if "hx-request" in request.headers else "error"
        return secured(HTMLResponse(self.render(template, session, request.url.path, {"lines": lines}), status))


def secured(response: Response) -> Response:
    """Add the headers that every response of the pages has."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    return response


async def fields_of(request: Request, limit: int) -> dict[str, list[str]]:
    """Read the fields of a form, or of the address; line ends are as they are in files.

    Raises:
        ApiError: it is too large, no form, or not UTF-8.
    """
    if request.method != "POST":
        return {name: request.query_params.getlist(name) for name in request.query_params}
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This is no form.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The form is too large: at most {limit} bytes.")
    found: dict[str, list[str]] = {}
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "This is no form in UTF-8.") from error
    for name, value in pairs:
        found.setdefault(name, []).append(value.replace("\r\n", "\n"))
    return found


def check_token(visit: Visit) -> None:
    """Refuse a form that no page of this session sent.

    Raises:
        ApiError: its token is another, or the browser says that another site sent it.
    """
    if not secrets.compare_digest(visit.field("csrf").encode(), visit.session.csrf.encode()):
        raise ApiError(HTTPStatus.FORBIDDEN, "This form is of another session: load the page again.")
    check_site(visit.request)


def check_site(request: Request) -> None:
    """Refuse what the browser says another site sent.

    Raises:
        ApiError: it does.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(HTTPStatus.FORBIDDEN, "Another site sent this form.")


def _to_login(request: Request) -> Response:
    if "hx-request" in request.headers:
        return secured(Response(status_code=HTTPStatus.UNAUTHORIZED, headers={"HX-Redirect": f"{PREFIX}/login"}))
    return secured(RedirectResponse(f"{PREFIX}/login", HTTPStatus.SEE_OTHER))


async def _called(handler: Handler, visit: Visit) -> Response:
    if inspect.iscoroutinefunction(handler):
        return await handler(visit)  # type: ignore[no-any-return]
    return await run_in_threadpool(handler, visit)  # type: ignore[arg-type]
