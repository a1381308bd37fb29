"""What an engine is told and what it says: its command line, its requests and its events, without running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flows.serve.engines.pieces import Pieces
from tasks.core.errors import TemperError
from tasks.inference.decoding import Asked, Written
from tasks.inference.params import Generation

MODEL = "model"
"""What an engine calls the one model that it has."""


class Launch(NamedTuple):
    """How an engine is started.

    Attributes:
        program: its executable.
        model: what it reads: a model folder, or a file that was made of one.
        dtype: the number format of the weights.
        port: of this machine, to listen on.
        slots: requests that it answers at a time.
        context: the most tokens of a prompt and its answer; None: without such a limit.
        cache_bytes: memory for keys and values; None: as it sees fit.
        options: further words of its command line, which come last.
    """

    program: Path
    model: Path
    dtype: str
    port: int
    slots: int
    context: int | None
    cache_bytes: int | None = None
    options: Sequence[str] = ()


class Event(NamedTuple):
    """What one event of an answer says; `reason` is empty until its end: "stop" or "length"."""

    written: Sequence[Written] = ()
    reason: str = ""


class EngineFailed(TemperError):
    """An engine's answer is none: it says that it failed, or nothing that is known."""


class Reader(Protocol):
    """Reads the events of one answer, in their order."""

    def read(self, event: Mapping[str, Any]) -> Event:
        """Return what an event says.

        Raises:
            EngineFailed: it tells of an error, or has not the form that this engine's have.
        """
        ...


class Dialect(Protocol):
    """An engine, as far as it is known without running it.

    Attributes:
        name: what `--engine` calls it.
        program: the name of its executable.
        variable: the environment variable that says where that is.
        install: commands that put it into an environment of its own.
        dtypes: number formats that it takes.
        limits_cache: whether the memory of keys and values can be said; else slots and context make it.
        start_s: so long it may take until it answers.
    """

    name: str
    program: str
    variable: str
    install: Sequence[str]
    dtypes: Sequence[str]
    limits_cache: bool
    start_s: float

    def prepare(self, folder: Path, dtype: str, scratch: Path) -> Path:
        """Make what the engine reads of a model folder; return the folder itself, or what was written to `scratch`.

        Raises:
            BadModel: the engine has no such models.
        """
        ...

    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts it; the key is not in it, as every user of the machine may read it."""
        ...

    def environment(self, key: str) -> Mapping[str, str]:
        """Return the variables that it gets besides: the key that requests must say, and no reports to its makers."""
        ...

    def refused(self, asked: Asked) -> str:
        """Return the field of a request that it cannot do as temper's own engine does; empty where there is none."""
        ...

    def request(self, asked: Asked, end_ids: Collection[int], *, stream: bool) -> tuple[str, dict[str, Any]]:
        """Return the path and the JSON body of a request for a continuation of tokens."""
        ...

    def reader(self, end_ids: Collection[int], pieces: Pieces) -> Reader:
        """Return what reads the events of one answer, whole or streamed.

        Args:
            end_ids: tokens that end it.
            pieces: the bytes of tokens.
        """
        ...


def penalty_of(generation: Generation) -> str:
    """Return the field that asks for penalties, which other engines take of prompts too; empty without any."""
    return "repetition_penalty" if generation.repetition_penalty != 1 else ""


def failed(event: Mapping[str, Any]) -> EngineFailed:
    """Build the error for an event that says that the engine failed, or whose form is unknown; without its words."""
    told = event.get("error")
    kind = told.get("type") or told.get("code") if isinstance(told, dict) else None
    return EngineFailed("the engine gave no answer", got=str(kind or f"an event of {', '.join(sorted(event))}")[:200])
