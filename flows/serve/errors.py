"""Errors of the HTTP API, each in the form that OpenAI's clients read: message, type, param, code."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from tasks.core.errors import BadInput, TemperError, Transient

INVALID = "invalid_request_error"
LIMITED = "rate_limit_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that says why there is none; it ends no command, so it is none of temper's own errors.

    Args:
        status: the HTTP status.
        message: what is wrong, and what would have been right.
        param: the field of the request, with its path; None where it is no field's fault.
        code: a word for programs.
        kind: OpenAI's `type` of error.
        headers: of the response, besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def unsupported(param: str, message: str) -> ApiError:
    """Build the refusal of what OpenAI's API has and this server has not."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code="unsupported_parameter")


def context_exceeded(limit: int, prompt: int, asked: int | None, param: str) -> ApiError:
    """Build the refusal of a prompt that leaves no room for an answer, or not for the one that is asked for."""
    wanted = f" and asks for {asked} more" if asked is not None else ""
    message = f"This model's maximum context length is {limit} tokens; the prompt has {prompt}{wanted}."
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code="context_length_exceeded")


def busy(retry_after_s: float) -> ApiError:
    """Build the answer to a request for which there is no room in the queue."""
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "The queue is full; try again later.",
        code="queue_full",
        kind=LIMITED,
        headers={"Retry-After": str(max(1, round(retry_after_s)))},
    )


def timed_out(limit_s: float) -> ApiError:
    """Build the answer to a request that took too long."""
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT, f"The answer was not ready within {limit_s:g} s.", code="timeout", kind="timeout"
    )


def failed() -> ApiError:
    """Build the answer where this server itself went wrong; what it was is in its log, and is no client's matter."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "The model failed on this request.", code="failed", kind=SERVER)


def place_of(error: BaseException) -> str:
    """Name an error and its place, for the log; not its words, which may repeat a prompt."""
    places = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at " + ", ".join(f"{each.filename}:{each.lineno}" for each in places[-4:])


def of_validation(error: ValidationError) -> ApiError:
    """Convert what pydantic found to one answer, which names each field at fault and what was expected of it."""
    found = [(path_of(each["loc"]), each["msg"].removeprefix("Value error, ")) for each in error.errors()]
    message = "; ".join(f"{path}: {said}" if path else said for path, said in found[:5])
    if len(found) > 5:
        message += f"; and {len(found) - 5} more"
    first = error.errors()[0]
    code = "array_above_max_length" if first["type"] == "too_long" else "invalid_value"
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=found[0][0] or None, code=code)


def of_temper(error: TemperError, param: str | None) -> ApiError:
    """Convert an error of temper's own: bad input is the client's, what may go well later is the server's."""
    said = error.what + (f" (got {error.got})" if error.got else "")
    if isinstance(error, BadInput):
        return ApiError(HTTPStatus.BAD_REQUEST, said, param=param, code="invalid_value")
    later = {"Retry-After": "1"} if isinstance(error, Transient) else {}
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, error.what, code="unavailable", kind=SERVER, headers=later)


def path_of(places: tuple[int | str, ...]) -> str:
    """Write a place in a request as OpenAI does: messages[0].content; alternatives of a field are no place."""
    path = ""
    for place in places:
        if isinstance(place, str) and place.startswith("("):
            continue
        path += f"[{place}]" if isinstance(place, int) else f".{place}" if path else place
    return path
