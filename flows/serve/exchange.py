"""One request and its answers, from the version that was chosen for it to the record of what was said."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from flows.serve.errors import ApiError, place_of
from flows.serve.generation import Delta, Prepared, Running, TokenLogprob, prepare_chat, prepare_completion
from flows.serve.keys import Gatekeeper
from flows.serve.metrics import Metrics
from flows.serve.record import Conversation, Record
from flows.serve.recorded import SHADOW
from flows.serve.requests import SEEDS, ChatRequest, CompletionRequest
from flows.serve.responses import CHAT, COMPLETION, DONE, Form, Head, event, message, usage
from flows.serve.routing import Chosen, Models
from flows.serve.versions import LoadedVersion
from tasks.core.errors import Transient

GONE = 499
"""Status, in metrics alone, of a request whose client went away."""


class Service(NamedTuple):
    """What all requests share.

    Attributes:
        models: all that is served.
        gate: lets clients in.
        record: of conversations; None where nobody asked for one.
        metrics: figures for Prometheus.
        say: tells of what happens, in one line.
        time_limit_s: an answer is to be there within it.
        max_body_bytes: of a request.
        unseen: answers of shadows that are under way.
    """

    models: Models
    gate: Gatekeeper
    record: Record | None
    metrics: Metrics
    say: Callable[[str], None]
    time_limit_s: float
    max_body_bytes: int
    unseen: set[asyncio.Task[None]]


class Call(NamedTuple):
    """A request as it came.

    Attributes:
        name: the id of its response.
        key_name: the client; empty without keys.
        request: what it asks.
        seed: of its first answer.
        begun: when it came, by `time.monotonic`.
    """

    name: str
    key_name: str
    request: ChatRequest | CompletionRequest
    seed: int
    begun: float


class Exchange:
    """A request that was taken up: its answers are being written.

    Args:
        service: of the server.
        call: the request.
        chosen: what answers.
        prepared: the request as that takes it.
    """

    def __init__(self, service: Service, call: Call, chosen: Chosen, prepared: Prepared) -> None:
        self.request, self.form = call.request, form_of(call.request)
        self._service, self._call, self._chosen = service, call, chosen
        version = chosen.version.fingerprint
        self.head = Head(call.name, self.form.object, int(time.time()), chosen.model, version)
        self.running = Running(chosen.version, prepared)
        self._labels = (chosen.model, version, chosen.route)
        self._first_token_s: float | None = None
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in prepared.asked]
        self._stack, self._closed = ExitStack(), False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        version = self.head.system_fingerprint.encode("ascii", "backslashreplace").decode()
        return {"x-temper-version": version, "x-request-id": self.head.id}

    @property
    def _with_logprobs(self) -> bool:
        return self.running.prepared.asked[0].logprobs is not None

    async def whole(self) -> dict[str, Any]:
        """Return the whole response once all answers have ended.

        Raises:
            ApiError: the model failed, or it takes too long.
        """
        async for number, delta in self._deltas():
            self._logprobs[number] += delta.logprobs
        await self._write_down()
        choices = [
            self.form.choice(number, answer, self._logprobs[number] if self._with_logprobs else None)
            for number, answer in enumerate(self.running.answers)
        ]
        return {**self.head._asdict(), "choices": choices, "usage": usage(self.running)}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of the response as the answers are written; an error is the last one."""
        head = {**self.head._asdict(), "object": self.form.chunk}
        include_usage = self.request.stream_options.include_usage
        common = {"usage": None} if include_usage else {}
        status = GONE
        try:
            if self.form.begins:
                for number in range(len(self.running.answers)):
                    yield event({**head, "choices": [self.form.begins(number)], **common})
            async for number, delta in self._deltas():
                for choice in self.form.chunks(number, delta, self._with_logprobs):
                    yield event({**head, "choices": [choice], **common})
            if include_usage:
                yield event({**head, "choices": [], "usage": usage(self.running)})
            await self._write_down()
            status = 200
            yield DONE
        except ApiError as error:
            status = error.status
            yield event(error.body())
        finally:
            self.close(status)

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield what is new of the answers; note when the first of it came, and where the model failed."""
        try:
            async for number, delta in self.running.deltas(self._service.time_limit_s):
                if self._first_token_s is None:
                    self._first_token_s = time.monotonic() - self._call.begun
                    self._service.metrics.first_token_s.labels(*self._labels).observe(self._first_token_s)
                yield number, delta
        except ApiError as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, TimeoutError):
                self._service.say(f"{self.head.system_fingerprint}: an answer failed: {place_of(error.__cause__)}")
            raise

    async def _write_down(self) -> None:
        """Record the conversation, before the client is told that it has ended."""
        if self._service.record is None:
            return
        try:
            await asyncio.to_thread(self._service.record.add, self._conversation())
        except Transient as error:  # the answer is no worse for it
            self._service.say(f"a conversation could not be recorded: {error.line()}")

    def _conversation(self) -> Conversation:
        request, chosen = self.request, self._chosen
        chat = isinstance(request, ChatRequest)
        first = self.running.prepared.asked[0]
        return Conversation(
            id=self._call.name,
            key_name=self._call.key_name,
            endpoint=self.form.endpoint,
            model=chosen.model,
            version=chosen.version.fingerprint,
            adapter=chosen.adapter,
            route=chosen.route,
            prompt=request.said(),
            tools=request.offered_tools(),
            options={
                **request.generation(self._call.seed).model_dump(),
                "max_tokens": first.max_tokens,
                "n": request.n,
            },
            answers=[
                {**(message(answer) if chat else {"text": answer.text}), "finish_reason": answer.finish}
                for answer in self.running.answers
            ],
            prompt_tokens=self.running.prepared.prompt_tokens,
            answer_tokens=self.running.answer_tokens,
            first_token_s=self._first_token_s,
            seconds=time.monotonic() - self._call.begun,
            user=request.user,
            metadata=request.metadata,
        )

    def hold(self, stack: ExitStack) -> None:
        """Take over what keeps the version in memory, until `close`."""
        self._stack = stack

    def close(self, status: int) -> None:
        """End what is still being written, count the request by its status, and let go of the version; once."""
        if self._closed:
            return
        self._closed = True
        self.running.cancel()
        self._stack.close()
        metrics = self._service.metrics
        metrics.requests.labels(*self._labels, self.form.endpoint, status).inc()
        metrics.seconds.labels(*self._labels).observe(time.monotonic() - self._call.begun)
        metrics.prompt_tokens.labels(*self._labels).inc(self.running.prepared.prompt_tokens)
        metrics.answer_tokens.labels(*self._labels).inc(self.running.answer_tokens)


def form_of(request: ChatRequest | CompletionRequest) -> Form:
    """Return the form of the responses to a request."""
    return CHAT if isinstance(request, ChatRequest) else COMPLETION


async def take_up(service: Service, key_name: str, request: ChatRequest | CompletionRequest, begun: float) -> Exchange:
    """Choose a version for a request, prepare it and ask the engine.

    Raises:
        ApiError: nothing is served under this name, it cannot be answered, or the queue is full.
    """
    name = form_of(request).prefix + uuid.uuid4().hex
    call = Call(name, key_name, request, secrets.randbelow(SEEDS) if request.seed is None else request.seed, begun)
    with ExitStack() as stack:
        chosen = stack.enter_context(service.models.chosen(request.model, request.user or request.opening()))
        prepared = await asyncio.to_thread(_prepare, chosen.version, call, chosen.adapter)
        exchange = Exchange(service, call, chosen, prepared)
        exchange.running.submit()
        if chosen.unseen:
            _answer_unseen(service, call, chosen.unseen)
        exchange.hold(stack.pop_all())
    return exchange


def _prepare(version: LoadedVersion, call: Call, adapter: str | None) -> Prepared:
    if isinstance(call.request, ChatRequest):
        return prepare_chat(version, call.request, adapter, call.seed)
    return prepare_completion(version, call.request, adapter, call.seed)


def _answer_unseen(service: Service, seen: Call, version: LoadedVersion) -> None:
    """Let another version answer the same request, for the record alone; not while it has others in its queue."""
    dropped = service.metrics.shadow_dropped.labels(seen.request.model, version.fingerprint)
    if version.engine.state().waiting:
        dropped.inc()
        return
    stack = ExitStack()
    stack.enter_context(version.in_use())

    async def answer() -> None:
        call = seen._replace(name=f"{seen.name}-shadow", begun=time.monotonic())
        with stack:
            try:
                prepared = await asyncio.to_thread(_prepare, version, call, None)
                exchange = Exchange(service, call, Chosen(version, seen.request.model, None, SHADOW, None), prepared)
                exchange.running.submit()
            except ApiError:  # as where its context is shorter
                dropped.inc()
                return
            status = GONE
            try:
                await exchange.whole()
                status = 200
            except ApiError as error:
                status = error.status
            finally:
                exchange.close(status)

    task = asyncio.get_running_loop().create_task(answer())
    service.unseen.add(task)
    task.add_done_callback(service.unseen.discard)
