"""Which version answers a request: by the model's name, and for a share of the conversations a challenger."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from flows.serve.errors import SERVER, ApiError
from flows.serve.recorded import CANARY, SERVED, SHADOW
from flows.serve.versions import ADAPTER_NAME, LoadedVersion, Reference, Settings, Slot, Source
from tasks.core.errors import BadParams, did_you_mean

POLL_S = 2.0
"""How often aliases are looked at."""


def in_share(key: str, share: float) -> bool:
    """Return whether a conversation or user belongs to a share of all: a fixed function of its name.

    Args:
        key: what stays the same, so that whoever is in the share stays in it, and in every larger one.
        share: 0 to 1.
    """
    position = int.from_bytes(hashlib.sha256(f"canary:{key}".encode()).digest()[:8], "big") / 2**64
    return position < share


class Plan(NamedTuple):
    """What is served.

    Attributes:
        references: of the models, the first of which has the adapters, and canary and shadow beside it; there may be
            none, as where only pages are looked at.
        adapters: their folders, by name.
        canary: an alias of the first model and the share of conversations that it answers.
        shadow: an alias of the first model that answers unseen.
    """

    references: Sequence[Reference]
    adapters: Mapping[str, Path]
    settings: Settings = Settings()
    canary: tuple[str, float] | None = None
    shadow: str | None = None
    any_base: bool = False


class Chosen(NamedTuple):
    """The version for a request, kept in memory for it; `unseen` is one that answers too, for the record alone."""

    version: LoadedVersion
    model: str
    adapter: str | None
    route: str
    unseen: LoadedVersion | None


class Models:
    """All models of a server, and the thread that follows their aliases.

    Args:
        plan: what is served.
        workspace: whose registry it is.
        say: tells of what happens, in one line.

    Raises:
        BadParams: two have the same name, canary and shadow stand beside no model of the registry, or another engine is
            to have adapters.
    """

    def __init__(self, plan: Plan, workspace: Path | None, say: Callable[[str], None]) -> None:
        self._plan = plan
        first = next(iter(plan.references), None)
        if plan.adapters and plan.settings.engine:
            raise BadParams(
                "has no adapters here",
                where=f"--engine {plan.settings.engine.dialect.name}",
                got=f"--adapter {next(iter(plan.adapters))}",
                fix="merge it into the model (`temper merge`), or serve without --engine",
            )
        self._slots: dict[str, Slot] = {}
        self._short: dict[str, str] = {}
        for reference in plan.references:
            short, long = reference.names()
            name = short if short not in self._slots else long
            if name in self._slots or name in plan.adapters:
                raise BadParams("is a name of two models", where="temper serve", got=name, expected="one of each name")
            adapters = plan.adapters if reference is first else {}
            source = Source(reference, workspace, adapters, plan.settings, any_base=plan.any_base, say=say)
            self._slots[name] = Slot(source, say)
            self._short.setdefault(long, name)
        self._first = next(iter(self._slots), "")
        self._beside: dict[str, Slot] = {}
        for route, alias in ((CANARY, plan.canary and plan.canary[0]), (SHADOW, plan.shadow)):
            if not alias:
                continue
            if first is None or not first.model:
                got = f"{first.text}, a folder" if first else "no model"
                raise BadParams("stands beside a model of the registry", where=f"--{route} {alias}", got=got)
            beside = Reference(f"models:/{first.model}@{alias}", first.model, alias=alias)
            self._beside[route] = Slot(Source(beside, workspace, {}, plan.settings, say=say), say, stays=False)
        self._ended = threading.Event()
        self._follower: threading.Thread | None = None

    def begin(self) -> None:
        """Load all models, then follow their aliases.

        Raises:
            BadInput: one cannot be used.
            RegistryUnreachable: MLflow does not answer.
        """
        for slot in self._slots.values():
            slot.begin()
        for slot in self._beside.values():
            slot.follow()  # there may be no challenger yet
        self._follower = threading.Thread(target=self._follow, name="follow aliases", daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        while not self._ended.wait(POLL_S):
            for slot in self._all():
                if slot.source.reference.alias:
                    slot.follow()

    def close(self, *, finish: bool) -> None:
        """Release all models; with `finish` what runs is answered first."""
        self._ended.set()
        if self._follower:
            self._follower.join()
        for slot in self._all():
            slot.close(finish=finish)

    @contextmanager
    def chosen(self, model: str, conversation: str) -> Iterator[Chosen]:
        """Choose the version for a request, and keep it in memory within this block.

        Args:
            model: the name that the request says, of a model or of an adapter.
            conversation: names the user or the conversation.

        Raises:
            ApiError: nothing is served under this name (404), or its version is gone (503).
        """
        name, adapter = self._find(model)
        with ExitStack() as stack:
            version, route, unseen = stack.enter_context(self._slots[name].in_use()), SERVED, None
            if name == self._first and adapter is None:
                unseen = self._beside_of(stack, SHADOW, version)
                if self._plan.canary and in_share(conversation, self._plan.canary[1]):
                    canary = self._beside_of(stack, CANARY, version)
                    version, route = (canary, CANARY) if canary else (version, route)
            if version is None:
                raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "The server ends.", code="ending", kind=SERVER)
            yield Chosen(version, model, adapter, route, unseen)

    def _beside_of(self, stack: ExitStack, route: str, version: LoadedVersion | None) -> LoadedVersion | None:
        """Return what stands beside a version, unless it is the same one."""
        if route not in self._beside:
            return None
        other = stack.enter_context(self._beside[route].in_use())
        same = other is None or version is None or other.fingerprint == version.fingerprint
        return None if same else other

    def _find(self, model: str) -> tuple[str, str | None]:
        if model in self._plan.adapters:
            return self._first, model
        name = self._short.get(model, model)
        if name not in self._slots:
            near = did_you_mean(model, self.names())
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"The model {model!r} does not exist{near}",
                param="model",
                code="model_not_found",
            )
        return name, None

    def names(self) -> list[str]:
        """List the names that requests may say: of models, then of adapters on the first one."""
        return [*self._slots, *self._plan.adapters]

    def version_of(self, name: str) -> str:
        """Return the fingerprint of what answers under a name; empty where nothing does."""
        current = self._slots[self._find(name)[0]].current
        return current.fingerprint if current else ""

    def report(self) -> list[dict[str, Any]]:
        """Tell of every model where it comes from, what is in memory, and what was refused."""
        routes = [(SERVED, slot) for slot in self._slots.values()] + list(self._beside.items())
        return [
            {
                "from": slot.source.reference.text,
                "route": route,
                "version": slot.current.fingerprint if slot.current else None,
                "engine": slot.current.made_by if slot.current else None,
                "refused": {"version": slot.refused[0], "why": slot.refused[1]} if slot.refused else None,
                "registry": slot.unreachable or None,
            }
            for route, slot in routes
        ]

    def versions(self) -> list[tuple[str, LoadedVersion]]:
        """List what is in memory, each with the model's name in its reference."""
        return [(slot.source.reference.names()[0], slot.current) for slot in self._all() if slot.current]

    def _all(self) -> list[Slot]:
        return [*self._slots.values(), *self._beside.values()]


def adapter_of(text: str) -> tuple[str, str]:
    """Split NAME=REF of an adapter.

    Raises:
        BadParams: it is none.
    """
    name, equals, reference = text.partition("=")
    if not equals or not reference or not ADAPTER_NAME.fullmatch(name):
        raise BadParams(
            "is no adapter with a name",
            where=f"--adapter {text}",
            expected="NAME=REF, with A-Z a-z 0-9 _ . - in the name",
        )
    return name, reference


def canary_of(text: str) -> tuple[str, float]:
    """Split ALIAS=SHARE.

    Raises:
        BadParams: it is none.
    """
    alias, _, share = text.partition("=")
    try:
        found = float(share)
    except ValueError:
        found = -1.0
    if not alias or not 0 < found <= 1:
        raise BadParams(
            "is no share of the conversations",
            where=f"--canary {text}",
            expected="ALIAS=SHARE, such as challenger=0.05",
        )
    return alias, found
