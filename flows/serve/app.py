"""The HTTP app: OpenAI's endpoints, feedback, health and figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from flows.serve.errors import ApiError, failed, of_temper, place_of
from flows.serve.exchange import GONE, Exchange, Service, take_up
from flows.serve.requests import ChatRequest, CompletionRequest, FeedbackRequest, parse
from tasks.core.errors import TemperError

_DRAINED = 16
"""So many times the largest body is read and thrown away, so that a client that sends on hears why it is refused."""
_SLOW_S = 30.0
"""How much longer than the time limit a client may take to read a stream."""


def make_app(service: Service) -> FastAPI:
    """Build the app of a server.

    It has no pages of documentation: FastAPI's fetch scripts from elsewhere, and the API is OpenAI's.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if service.unseen:
            await asyncio.wait(set(service.unseen), timeout=_SLOW_S)

    app = FastAPI(title="temper", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.router.route_class = _guarded(service)
    app.add_exception_handler(HTTPException, _no_such_route)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        key_name = _admit(service, request)
        said = parse(await _body(service, request), FeedbackRequest)
        if service.record is None:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                "This server keeps no record of answers; it is started with --record for that.",
                code="no_record",
            )
        await asyncio.to_thread(service.record.say, said, key_name)
        kind = "thumb" if said.thumb else "better" if said.better else "preferred_over"
        service.metrics.feedback.labels(kind).inc()
        return JSONResponse({"id": said.id, "object": "feedback", "recorded": True})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _admit(service, request)
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.models.names()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _admit(service, request)
        return JSONResponse(_model(service, name))

    @app.get("/health")
    async def health(request: Request) -> Response:
        report: dict[str, Any] = {"status": "ok"}
        if service.gate.open or service.gate.known(request.headers.get("authorization")):
            report["models"] = service.models.report()
        return JSONResponse(report)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _admit(service, request)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "temper",
        "version": service.models.version_of(name),
    }


async def _answer(service: Service, request: Request, form: type[ChatRequest] | type[CompletionRequest]) -> Response:
    begun = time.monotonic()
    try:
        key_name = _admit(service, request)
        asked = parse(await _body(service, request), form)
        exchange = await take_up(service, key_name, asked, begun)
    except ApiError as error:
        endpoint = "chat" if form is ChatRequest else "completions"
        service.metrics.requests.labels("", "", "", endpoint, error.status).inc()
        raise
    if asked.stream:
        return _EventStream(exchange, service.time_limit_s + _SLOW_S, service.say)
    return await _whole(exchange, request)


async def _whole(exchange: Exchange, request: Request) -> Response:
    """Return the whole response; where the client goes away before, what is being written for it is given up."""
    answer = asyncio.ensure_future(exchange.whole())
    gone = asyncio.ensure_future(_gone(request.receive))
    status = GONE
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=GONE)
        status = HTTPStatus.OK
        return JSONResponse(answer.result(), headers=exchange.headers)
    except ApiError as error:
        status = error.status
        error.headers |= exchange.headers
        raise
    finally:
        exchange.close(status)
        await _ended(answer, gone)


class _EventStream(Response):
    """A stream of events (SSE), which ends with its client, and with one that does not read on."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, limit_s: float, say: Callable[[str], None]) -> None:
        super().__init__(headers={**exchange.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._limit_s, self._say = exchange, limit_s, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, gone}, timeout=self._limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wrong = await _ended(writing, gone)
            self._exchange.close(GONE)  # where the events were not even begun
        if wrong:
            self._say(f"a stream failed: {place_of(wrong)}")

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._exchange.events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> Exception | None:
    """Cancel tasks, and wait until each has cleared up; return what went wrong in one, unless it is told elsewhere."""
    for task in tasks:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return next((each for each in found if isinstance(each, Exception) and not isinstance(each, ApiError)), None)


def _admit(service: Service, request: Request) -> str:
    return service.gate.admit(request.headers.get("authorization"), request.headers.get("host"))


async def _body(service: Service, request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        ApiError: it is too large (413), or of another type than JSON (415): that is what a page in a browser can send
            here without being allowed to.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limit, size, parts = service.max_body_bytes, 0, list[bytes]()
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > limit * _DRAINED:
            break
    if size > limit:
        raise ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The request is too large: at most {limit} bytes.",
            code="request_too_large",
        )
    if kind != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "The body must be JSON: send it with the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    return b"".join(parts)


Handler = Callable[[Request], Awaitable[Response]]


def _guarded(service: Service) -> type[APIRoute]:
    """Build routes of which every error is an answer in OpenAI's form."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Any:
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                try:
                    return await handle(request)
                except ApiError as error:
                    return as_response(error)
                except TemperError as error:
                    return as_response(of_temper(error, None))
                except HTTPException:
                    raise
                except ClientDisconnect:  # while it was sending
                    return Response(status_code=GONE)
                except Exception as error:
                    service.say(f"{request.url.path} failed: {place_of(error)}")
                    return as_response(failed())

            return guarded

    return Guarded


def as_response(error: ApiError) -> JSONResponse:
    """Return an error as the response that says it."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", HTTPStatus.NOT_FOUND)
    said = f"{request.method} {request.url.path[:200]}: {HTTPStatus(status).phrase}"
    return as_response(
        ApiError(status, said, code="not_found" if status == HTTPStatus.NOT_FOUND else "invalid_request")
    )
