"""Who looks at the pages: sessions that begin with a key, and roles."""

from __future__ import annotations

import getpass
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from flows.serve.errors import ApiError
from flows.serve.keys import APPROVER, ROLES, Gatekeeper

LIFETIME_S = 12 * 3600.0
"""A session ends after a working day."""


class Session(NamedTuple):
    """Somebody who is logged in.

    Attributes:
        name: that of the key; without keys, of the user of this machine.
        role: what they may do.
        csrf: what every form of theirs carries.
        until: when it ends, by the clock of the sessions.
    """

    name: str
    role: str
    csrf: str
    until: float

    def may(self, role: str) -> bool:
        """Return whether they may do what somebody of a role may."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Sessions:
    """All sessions of a server; they end with it.

    Where there are no keys, nobody but this machine's user reaches the server, who is approver without logging in.

    Args:
        gate: knows the keys.
        clock: seconds, which only go forward.
    """

    def __init__(self, gate: Gatekeeper, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate, self._clock, self._lock = gate, clock, threading.Lock()
        self._found: dict[str, Session] = {}
        self._local = Session(getpass.getuser(), APPROVER, secrets.token_urlsafe(32), float("inf"))

    @property
    def open(self) -> bool:
        """Whether nobody needs to log in."""
        return self._gate.open

    def begin(self, key: str) -> str:
        """Begin a session; return the token that its cookie holds.

        Raises:
            ApiError: the key is not known (401), or has no role on the pages (403).
        """
        known = self._gate.known(f"Bearer {key}")
        if known is None:
            raise ApiError(HTTPStatus.UNAUTHORIZED, "This key is not known.")
        if known.role is None:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                f"The key of {known.name} is for the API alone: its line has no role ({', '.join(ROLES)}).",
            )
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._found = {name: each for name, each in self._found.items() if each.until > now}
            self._found[token] = Session(known.name, known.role, secrets.token_urlsafe(32), now + LIFETIME_S)
        return token

    def find(self, token: str | None, host: str | None) -> Session | None:
        """Return the session of a request; None where somebody has to log in.

        Args:
            token: of its cookie.
            host: its Host header.

        Raises:
            ApiError: there are no keys, and the host is not this machine (403).
        """
        if self.open:
            self._gate.admit(None, host)
            return self._local
        with self._lock:
            found = self._found.get(token or "")
            return found if found and found.until > self._clock() else None

    def end(self, token: str | None) -> None:
        """End a session."""
        with self._lock:
            self._found.pop(token or "", None)
