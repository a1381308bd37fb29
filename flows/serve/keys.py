"""Keys of clients: who may ask, and how often. A key itself is nowhere kept, only its SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from flows.serve.errors import LIMITED, ApiError
from tasks.core.errors import BadParams

VARIABLE = "TEMPER_KEYS"
"""Lines of keys, separated by line ends or commas, for where there is no file."""

VIEWER, LABELLER, APPROVER = ROLES = ("viewer", "labeller", "approver")
"""What a client may do on the pages of `temper ui`: each also what those before it may."""

_LINE = re.compile(rf"([A-Za-z0-9_.-]{{1,64}}):([0-9a-f]{{64}})(?::([1-9][0-9]{{0,8}}))?(?::({'|'.join(ROLES)}))?")
_FORM = "NAME:SHA256[:REQUESTS_PER_MINUTE][:ROLE], as `temper serve --new-key NAME` prints"
_MINUTE_S = 60.0


class Key(NamedTuple):
    """A client.

    Attributes:
        name: of the client.
        sha256: of its key.
        per_minute: so many requests it may make in a minute; None: any number.
        role: what it may do on the pages of `temper ui`; None: it is let in to the API alone.
    """

    name: str
    sha256: str
    per_minute: int | None = None
    role: str | None = None


def new_key(name: str, role: str | None = None) -> tuple[str, str]:
    """Make a key; return it, and the line that a file of keys has of it.

    Raises:
        BadParams: no client can have this name, or there is no such role.
    """
    if role not in (None, *ROLES):
        raise BadParams("is no role", where="--role", got=str(role), expected=" or ".join(ROLES))
    key = f"temper-{secrets.token_urlsafe(32)}"
    line = ":".join(filter(None, (name, _sha256(key), role)))
    if not _LINE.fullmatch(line):
        raise BadParams("is no name of a key", where="--new-key", got=name, expected="A-Z a-z 0-9 _ . -, at most 64")
    return key, line


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> list[Key]:
    """Read the keys of a file, and those of TEMPER_KEYS.

    Raises:
        BadParams: a line is none, or two have the same name; all such lines are named, without what stands in them.
    """
    lines: list[tuple[str, str]] = []
    if file:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadParams("the keys cannot be read", where=str(file), got=type(error).__name__) from None
        lines += [(f"{file}:{number}", line) for number, line in enumerate(text.splitlines(), start=1)]
    given = re.split(r"[\n,]", environment.get(VARIABLE, ""))
    lines += [(f"{VARIABLE}, entry {number}", line) for number, line in enumerate(given, start=1)]
    found, wrong = list[Key](), list[str]()
    for where, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            wrong.append(f"{where}: is no key")  # its text may be the key itself
        elif any(key.name == match[1] for key in found):
            wrong.append(f"{where}: {match[1]} has a key already")
        else:
            found.append(Key(match[1], match[2], int(match[3]) if match[3] else None, match[4]))
    if wrong:
        raise BadParams("keys cannot be used", where=str(file or VARIABLE), examples=wrong, expected=_FORM)
    if file and not found:
        raise BadParams("holds no key", where=str(file), expected=_FORM)
    return found


def check_host(host: str, keys: Iterable[Key]) -> None:
    """Refuse to be reached from other machines without keys.

    Raises:
        BadParams: there are none, and the host is not the machine itself.
    """
    if not is_loopback(host) and not any(True for _ in keys):
        raise BadParams(
            "whoever reaches this address could use the models",
            where=f"--host {host}",
            expected="keys, or 127.0.0.1",
            fix="make a key: temper serve --new-key NAME; then give the file: --keys FILE",
        )


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Gatekeeper:
    """Lets requests in: by their key and its rate where there are keys, else from this machine only.

    Without keys the Host header must be this machine's name, so that no page in a browser asks under a name of its own
    that leads here (DNS rebinding).

    Args:
        keys: of the clients; none: whoever reaches this server may ask.
        clock: seconds, which only go forward.
    """

    def __init__(self, keys: Iterable[Key], clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock = tuple(keys), clock
        self._times: dict[str, deque[float]] = {key.name: deque() for key in self._keys}
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    def admit(self, authorization: str | None, host: str | None) -> str:
        """Return the name of the client; empty where there are no keys.

        Raises:
            ApiError: it has no key or a wrong one (401), asks too often (429), or for another host (403).
        """
        if not self._keys:
            self._check_named(host)
            return ""
        key = self.known(authorization)
        if key is None:
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "No key, or one that is not known: give it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        self._count(key)
        return key.name

    def known(self, authorization: str | None) -> Key | None:
        """Return the key of a request, if it is one; in the same time for any text."""
        scheme, _, token = (authorization or "").partition(" ")
        given = _sha256(token.strip())
        same = [key for key in self._keys if hmac.compare_digest(key.sha256, given)]
        return same[0] if same and scheme.lower() == "bearer" else None

    def _check_named(self, host: str | None) -> None:
        name = re.sub(r":\d+\Z", "", host or "localhost")
        if not is_loopback(name):
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "This server has no keys, so it answers under the name of this machine only.",
                code="wrong_host",
            )

    def _count(self, key: Key) -> None:
        if key.per_minute is None:
            return
        with self._lock:
            now, times = self._clock(), self._times[key.name]
            while times and now - times[0] >= _MINUTE_S:
                times.popleft()
            if len(times) >= key.per_minute:
                wait = max(1, int(_MINUTE_S - (now - times[0])) + 1)
                raise ApiError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"More than {key.per_minute} requests in a minute.",
                    code="rate_limit_exceeded",
                    kind=LIMITED,
                    headers={"Retry-After": str(wait)},
                )
            times.append(now)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
