"""Responses in OpenAI's form: whole ones, and the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flows.serve.generation import Answer, Delta, Running, TokenLogprob

DONE = b"data: [DONE]\n\n"

_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""What some clients take for the end of a line; JSON may say it otherwise."""


class Head(NamedTuple):
    """What every response and chunk of a request begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


def event(content: Mapping[str, Any]) -> bytes:
    """Encode one event of a stream (SSE); it is whole characters, on one line."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()


def usage(running: Running) -> dict[str, int]:
    """Count the tokens of a request."""
    prompt, answer = running.prepared.prompt_tokens, running.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


# --- /v1/chat/completions ---------------------------------------------------------------------------------------------


def message(answer: Answer) -> dict[str, Any]:
    """Return an answer as the assistant's turn."""
    content = answer.text if answer.text or not answer.calls else None
    calls = {"tool_calls": answer.calls} if answer.calls else {}
    return {"role": "assistant", "content": content, "refusal": None, **calls}


def chat_choice(number: int, answer: Answer, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    """Return a choice of a whole response."""
    return {
        "index": number,
        "message": message(answer),
        "logprobs": _chat_logprobs(logprobs),
        "finish_reason": answer.finish,
    }


def chat_begins(number: int) -> dict[str, Any]:
    """Return the choice of the first chunk of an answer, which says whose turn it is."""
    delta = {"role": "assistant", "content": "", "refusal": None}
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


def chat_chunks(number: int, delta: Delta, logprobs: bool) -> list[dict[str, Any]]:
    """Return the choices of the chunks that say what is new of an answer; its end is in one of its own."""
    chunks = []
    said: dict[str, Any] = {"content": delta.text} if delta.text or (delta.logprobs and logprobs) else {}
    if delta.calls:
        said["tool_calls"] = [{"index": place, **call} for place, call in enumerate(delta.calls)]
    if said:
        shown = _chat_logprobs(delta.logprobs if logprobs else None)
        chunks.append({"index": number, "delta": said, "logprobs": shown, "finish_reason": None})
    if delta.finish:
        chunks.append({"index": number, "delta": {}, "logprobs": None, "finish_reason": delta.finish})
    return chunks


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        {
            "token": each.token,
            "logprob": each.logprob,
            "bytes": list(each.utf8),
            "top_logprobs": [{"token": t, "logprob": logprob, "bytes": list(b)} for t, b, logprob in each.top],
        }
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


# --- /v1/completions --------------------------------------------------------------------------------------------------


def text_choice(number: int, answer: Answer, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    """Return a choice of a whole response."""
    return {
        "index": number,
        "text": answer.text,
        "logprobs": _text_logprobs(logprobs),
        "finish_reason": answer.finish,
    }


def text_chunks(number: int, delta: Delta, logprobs: bool) -> list[dict[str, Any]]:
    """Return the choice of the chunk that says what is new of an answer."""
    shown = _text_logprobs(delta.logprobs if logprobs else None)
    return [{"index": number, "text": delta.text, "logprobs": shown, "finish_reason": delta.finish or None}]


def _text_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{token: logprob for token, _, logprob in each.top} for each in logprobs],
        "text_offset": [each.start for each in logprobs],
    }


class Form(NamedTuple):
    """Form of an endpoint's responses.

    Attributes:
        endpoint: its name in metrics and records.
        prefix: of ids.
        object, chunk: names of a whole response and of a chunk.
        begins: makes the first chunk's choice of an answer, where there is one.
    """

    endpoint: str
    prefix: str
    object: str
    chunk: str
    choice: Callable[[int, Answer, Sequence[TokenLogprob] | None], dict[str, Any]]
    chunks: Callable[[int, Delta, bool], list[dict[str, Any]]]
    begins: Callable[[int], dict[str, Any]] | None


CHAT = Form("chat", "chatcmpl-", "chat.completion", "chat.completion.chunk", chat_choice, chat_chunks, chat_begins)
COMPLETION = Form("completions", "cmpl-", "text_completion", "text_completion", text_choice, text_chunks, None)
