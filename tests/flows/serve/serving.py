"""Servers for tests: the app on a port of this machine, in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from flows.serve.app import make_app
from flows.serve.errors import ApiError
from flows.serve.exchange import Service
from flows.serve.json_schema import Grammars
from flows.serve.record import Record
from flows.serve.recorded import SERVED
from flows.serve.routing import Chosen, Models, Plan
from flows.serve.server import Options, Server, listen, make_service
from flows.serve.tool_calls import NO_TOOLS, Tools
from flows.serve.versions import Reference, Settings
from tasks.inference.continuous_batching import Busy, State
from tasks.inference.decoding import Asked, Ended, Written


@contextmanager
def listening(served: Service | FastAPI) -> Iterator[str]:
    """The address of a server, of the API alone or of a whole app, which has ended after the block."""
    app = served if isinstance(served, FastAPI) else make_app(served)
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(app, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert ready.wait(60)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(folder: Path, record: Record | None = None, **options: Any) -> Iterator[str]:
    """The address of a server of a model folder."""
    plan = Plan([Reference(str(folder))], options.pop("adapters", {}), options.pop("settings", Settings()))
    models = Models(plan, None, options.pop("say", print))
    models.begin()
    try:
        with listening(make_service(models, Options(**options), record)) as address:
            yield address
    finally:
        models.close(finish=True)


class Engine:
    """An engine that writes what the test says, when the test says it."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.tells: list[Callable[[Written | Ended], None]] = []
        self.cancelled: list[threading.Event] = []
        self.submitted = threading.Semaphore(0)
        self.full = False

    def submit(self, asked: Asked, tell: Callable[[Written | Ended], None]) -> Any:
        """Note a request."""
        if self.full:
            raise Busy("the queue is full")
        self.asked.append(asked)
        self.tells.append(tell)
        self.cancelled.append(threading.Event())
        self.submitted.release()
        return SimpleNamespace(cancel=self.cancelled[-1].set)

    def state(self) -> State:
        """Nothing is known of it."""
        return State(0, 0, 0, 0, 0)


@contextmanager
def scripted(
    tokenizer: PreTrainedTokenizerBase, tools: Tools = NO_TOOLS, **options: Any
) -> Iterator[tuple[str, Engine]]:
    """The address of a server whose engine does what the test says."""
    engine = Engine()
    version: Any = SimpleNamespace(
        fingerprint="scripted/1",
        encodes=False,
        tokenizer=tokenizer,
        tools=tools,
        vocabulary=len(tokenizer),
        grammars=Grammars(tokenizer, len(tokenizer)),
        context=10_000,
        end_ids=frozenset([tokenizer.eos_token_id]),
        engine=engine,
    )

    @contextmanager
    def chosen(model: str, conversation: str) -> Iterator[Chosen]:
        if model != "scripted":
            raise ApiError(404, "no")
        yield Chosen(version, model, None, SERVED, None)

    models: Any = SimpleNamespace(chosen=chosen, names=lambda: ["scripted"], versions=list, report=list)
    with listening(make_service(models, Options(**options))) as address:
        yield address, engine
