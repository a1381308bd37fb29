"""A request under way: what the engine is asked, and what its tokens become for the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from flows.serve.errors import SERVER, ApiError, busy, context_exceeded, failed, of_temper, timed_out, unsupported
from flows.serve.requests import ChatRequest, CompletionRequest
from flows.serve.text_stream import AnswerText
from flows.serve.tool_calls import CallReader
from flows.serve.versions import LoadedVersion
from tasks.core.errors import BadData, TemperError
from tasks.inference.continuous_batching import Busy, Handle
from tasks.inference.decoding import Asked, Ended, Written
from tasks.tokenization.chat_template import render_prompt

MAX_UNREAD = 8192
"""Tokens of a request that wait for its client; one that leaves more unread is given up."""


_LEAST_LOGPROB = -9999.0
"""What OpenAI writes for tokens that could not come; JSON has no infinity."""


class TokenLogprob(NamedTuple):
    """A token of an answer with its log-probability, in nats, and the likeliest ones in its place."""

    token: str
    utf8: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]
    start: int
    """Where its text begins in the answer, in characters."""


class Delta(NamedTuple):
    """What is new of one answer; `finish` is empty until its end."""

    text: str = ""
    calls: Sequence[dict[str, Any]] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish: str = ""


class Prepared(NamedTuple):
    """A request as a version takes it: one `Asked` for each answer."""

    asked: Sequence[Asked]
    prompt_tokens: int
    stop: Sequence[str]
    chat: bool
    tools: bool


def prepare_chat(version: LoadedVersion, request: ChatRequest, adapter: str | None, seed: int) -> Prepared:
    """Render a conversation and check that it can be answered; it takes time, so it runs in a thread.

    Raises:
        ApiError: it cannot.
    """
    tools, schema = request.offered_tools(), request.response_format.schema_of_answer()
    if request.logprobs:
        version.grammars.trie("logprobs")  # here, where nobody waits for it
    if tools and not version.tools.reads:
        raise unsupported("tools", "tools: the chat template of this model does not tell it of tools")
    if tools and schema:
        raise unsupported("response_format", "response_format is not supported together with tools")
    prompt = _only_text(version, request) if version.encodes else _rendered(version, request, tools)
    room = _room(version, len(prompt), request.limit(), "messages")
    asked = [
        Asked(
            tuple(prompt),
            room,
            request.generation(seed + number),
            adapter,
            request.top_logprobs if request.logprobs else None,
            version.grammars.constraint(schema) if schema else None,
        )
        for number in range(request.n)
    ]
    return Prepared(asked, len(prompt), request.stop, chat=True, tools=bool(tools))


def _rendered(version: LoadedVersion, request: ChatRequest, tools: Sequence[str]) -> list[int]:
    try:
        return render_prompt(version.tokenizer, [each.message() for each in request.messages], tools)
    except BadData as error:
        raise of_temper(error, "messages") from error


def _only_text(version: LoadedVersion, request: ChatRequest) -> list[int]:
    """Return the tokens of the one thing that a user says to a model that knows nothing of turns."""
    messages = [each.message() for each in request.messages]
    if [each.role for each in messages] != ["user"]:
        raise unsupported("messages", "messages: this model is an encoder-decoder, which reads one message of a user")
    return _tokens(version, messages[0].content)


def prepare_completion(version: LoadedVersion, request: CompletionRequest, adapter: str | None, seed: int) -> Prepared:
    """Tokenise the prompts of a completion and check that they can be gone on with.

    Raises:
        ApiError: they cannot.
    """
    if request.logprobs is not None:
        version.grammars.trie("logprobs")
    prompts = [_tokens(version, each) for each in request.prompts()]
    asked = [
        Asked(
            tuple(prompt),
            _room(version, len(prompt), request.max_tokens, "prompt"),
            request.generation(seed + number),
            adapter,
            request.logprobs,
        )
        for prompt in prompts
        for number in range(request.n)
    ]
    return Prepared(asked, sum(map(len, prompts)), request.stop, chat=False, tools=False)


def _tokens(version: LoadedVersion, prompt: str | list[int]) -> list[int]:
    ids: list[int] = list(version.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
    if not ids or max(ids) >= version.vocabulary:
        message = "prompt: is empty" if not ids else f"prompt: tokens are below {version.vocabulary}"
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="prompt", code="invalid_value")
    return ids


def _room(version: LoadedVersion, prompt: int, asked: int | None, param: str) -> int:
    """Return the most tokens of an answer."""
    if version.context is None:
        return asked or _WITHOUT_CONTEXT
    fits = prompt <= version.context
    left = (version.context if fits else 0) if version.encodes else version.context - prompt
    if left < (asked or 1):
        raise context_exceeded(version.context, prompt, asked, param)
    return asked or left


_WITHOUT_CONTEXT = 4096
"""Tokens of an answer that nobody limits, of a model without a longest text."""


class Answer:
    """One answer that is being written."""

    def __init__(self, version: LoadedVersion, prepared: Prepared) -> None:
        tools = version.tools
        self._version, self._tools = version, prepared.tools
        self._text = AnswerText(
            version.tokenizer,
            stop=prepared.stop,
            end_ids=version.end_ids,
            strip=prepared.chat,
            shown=tools.shown if prepared.tools else {},
        )
        self._calls = CallReader(tools.form if prepared.tools else None)
        self._logprobs: list[TokenLogprob] = []
        self.tokens = 0
        self.finish = ""
        self.text = ""
        self.calls: list[dict[str, Any]] = []

    def add(self, written: Written) -> Delta:
        """Return what one more token makes certain."""
        self.tokens += 1
        start = self._text.decoded
        text = self._text.add(written.token)
        if written.logprob is not None and written.token not in self._version.end_ids:
            self._logprobs.append(self._named(written, start))
        if self._text.stopped:
            return self._end(text, "stop")
        return self._delta(self._calls.add(text))

    def end(self, reason: str) -> Delta:
        """Return what was held back when the last token has come."""
        return self._end(self._text.rest(), "stop" if self._text.stopped else reason)

    def _end(self, text: str, finish: str) -> Delta:
        certain = self._calls.add(text)
        held, self.calls = self._calls.end()
        self.finish = "tool_calls" if self.calls else finish
        return self._delta(certain + held)

    def _delta(self, text: str) -> Delta:
        self.text += text
        logprobs: list[TokenLogprob] = []
        if text or self.finish:
            logprobs = [each for each in self._logprobs if each.start < self._text.certain or not self.finish]
            self._logprobs = []
        return Delta(text, self.calls, logprobs, self.finish)

    def _named(self, written: Written, start: int) -> TokenLogprob:
        trie = self._version.grammars.trie("logprobs")

        def named(token: int) -> tuple[str, bytes]:
            utf8 = bytes(trie.decode_bytes([token]))
            return utf8.decode("utf-8", "replace"), utf8

        top = tuple((*named(token), max(logprob, _LEAST_LOGPROB)) for token, logprob in written.top)
        logprob = max(written.logprob or 0.0, _LEAST_LOGPROB)
        return TokenLogprob(*named(written.token), logprob, top, start)


class Running:
    """The answers to one request, from the engine's thread to the event loop that this is made in.

    Args:
        version: what answers.
        prepared: the request.
    """

    def __init__(self, version: LoadedVersion, prepared: Prepared) -> None:
        self.prepared = prepared
        self.answers = [Answer(version, prepared) for _ in prepared.asked]
        self._engine, self._loop = version.engine, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Written | Ended]] = asyncio.Queue()
        self._handles: list[Handle] = []

    def submit(self) -> None:
        """Ask the engine.

        Raises:
            ApiError: its queue is full (429).
        """
        try:
            for number, asked in enumerate(self.prepared.asked):
                self._handles.append(self._engine.submit(asked, partial(self._tell, number)))
        except Busy as error:
            self.cancel()
            raise busy(error.retry_after_s) from error

    def cancel(self) -> None:
        """End what is still being written."""
        for handle in self._handles:
            handle.cancel()

    def _tell(self, number: int, event: Written | Ended) -> None:
        """Take an event in the engine's thread, which never waits for a client."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self._loop.call_soon_threadsafe(self._take, number, event)

    def _take(self, number: int, event: Written | Ended) -> None:
        if self._events.qsize() > MAX_UNREAD:
            self.cancel()
            event = Ended("error", _unread())
        self._events.put_nowait((number, event))

    async def deltas(self, limit_s: float) -> AsyncIterator[tuple[int, Delta]]:
        """Yield what is new, by the number of its answer, until all have ended.

        Raises:
            ApiError: the model failed, or it takes longer than the limit (504).
        """
        left, deadline = len(self.answers), self._loop.time() + limit_s
        try:
            while left:
                try:
                    async with asyncio.timeout_at(deadline):
                        number, event = await self._events.get()
                except TimeoutError as error:
                    raise timed_out(limit_s) from error
                answer = self.answers[number]
                if answer.finish:  # by a stop text, of which the engine had not heard yet
                    continue
                delta = answer.add(event) if isinstance(event, Written) else answer.end(_reason(event))
                if delta.finish:
                    left -= 1
                    self._handles[number].cancel()
                if delta != Delta():
                    yield number, delta
        finally:
            self.cancel()

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.tokens for answer in self.answers)


def _unread() -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_TIMEOUT,
        f"{MAX_UNREAD} tokens of the answer were left unread.",
        code="unread",
        kind="timeout",
    )


def _reason(ended: Ended) -> str:
    """Return why an answer ended.

    Raises:
        ApiError: the engine failed on it, or gave it up.
    """
    if ended.reason == "cancelled":
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "The answer was given up, as the server ends.",
            code="ending",
            kind=SERVER,
        )
    if isinstance(ended.error, ApiError):
        raise ended.error
    if isinstance(ended.error, TemperError):
        raise of_temper(ended.error, None) from ended.error
    if ended.reason == "error":
        raise failed() from ended.error
    return ended.reason
