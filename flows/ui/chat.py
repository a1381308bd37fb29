"""A free chat with two models at once: both answer, one is preferred, and the talk goes on with its answer."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.routing import Route

from flows.serve.errors import ApiError
from flows.serve.exchange import GONE, take_up
from flows.serve.keys import LABELLER
from flows.serve.requests import ChatRequest, FeedbackRequest, parse
from flows.ui.site import Site, Visit
from tasks.core import pipeline
from tasks.core.parquet import read_records
from tasks.core.records import ChatExample, LabelledReply, PreferencePair, held_out
from tasks.orchestration.params import load_params

_LOOKED_AT = 20_000
"""Rows among which a question is drawn."""


class Reply(NamedTuple):
    """A model's answer: the id in the record, the version that gave it, its text."""

    id: str
    version: str
    text: str

    @property
    def quoted(self) -> str:
        """Return the text as a form keeps it: browsers, and `visible`, change line ends and control characters."""
        return json.dumps(self.text)


def routes(site: Site) -> list[Route]:
    """Return the page, what asks, what votes, and what draws a question."""

    def show(visit: Visit) -> Response:
        return site.page(visit, "chat", {**_about(site, visit), "prompt": "", "messages": "[]", "talk": []})

    async def ask(visit: Visit) -> Response:
        talk = [*talk_of(visit.field("messages")), {"role": "user", "content": visit.field("prompt")}]
        names = [visit.field("first"), visit.field("second")]
        replies = await _replies(site, visit.session.name, talk, names, drawn="drawn" in visit.fields)
        secrets.SystemRandom().shuffle(replies)
        values = {"talk": talk, "messages": json.dumps(talk), "replies": replies}
        return site.page(visit, "_chat" if visit.partial else "chat", {**_about(site, visit), **values})

    def vote(visit: Visit) -> Response:
        better, other = visit.field("better"), visit.field("other")
        site.record.say(FeedbackRequest(id=better, preferred_over=other), visit.session.name)
        site.service.metrics.feedback.labels("preferred_over").inc()
        talk = [*talk_of(visit.field("messages")), {"role": "assistant", "content": unquoted(visit.field("text"))}]
        values = {"talk": talk, "messages": json.dumps(talk), "preferred": visit.field("version"), "prompt": ""}
        values |= {"not_preferred": visit.field("other_version")}
        return site.page(visit, "_chat" if visit.partial else "chat", {**_about(site, visit), **values})

    def suggest(visit: Visit) -> Response:
        return site.page(visit, "_prompt", {"prompt": drawn_question(site.root)})

    return [
        site.route("/chat", show),
        site.route("/chat/ask", show, ask, may=LABELLER),
        site.route("/chat/vote", show, vote, may=LABELLER),
        site.route("/chat/suggest", suggest),
    ]


def _about(site: Site, visit: Visit) -> dict[str, Any]:
    names = site.service.models.names()
    first = visit.field("first") or next(iter(names), "")
    return {
        "names": names,
        "first": first,
        "second": visit.field("second") or next((name for name in names if name != first), first),
        "drawn": "drawn" in visit.fields,
        "kept": site.service.record is not None,
    }


def talk_of(text: str) -> list[dict[str, str]]:
    """Read the turns so far from the form, where the last answer put them.

    Raises:
        ApiError: they are none.
    """
    try:
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in json.loads(text or "[]")]
    except (ValueError, TypeError, KeyError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "This is no conversation: load the page again.") from error


def unquoted(text: str) -> str:
    """Return an answer from the form, where the last page put it.

    Raises:
        ApiError: it is none.
    """
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "This is no answer: load the page again.") from error


async def _replies(site: Site, name: str, talk: list[dict[str, str]], models: list[str], *, drawn: bool) -> list[Reply]:
    """Let two models answer at once; one model answers twice, drawn with two seeds."""
    options = {"temperature": 1.0} if drawn or models[0] == models[1] else {}
    common = {"messages": talk, "metadata": {"from": "ui"}, **options}
    requests = [parse(json.dumps({"model": model, **common}).encode(), ChatRequest) for model in models]
    return list(await asyncio.gather(*(_reply(site, name, request) for request in requests)))


async def _reply(site: Site, name: str, request: ChatRequest) -> Reply:
    exchange = await take_up(site.service, name, request, time.monotonic())
    status = GONE
    try:
        whole = await exchange.whole()
        status = HTTPStatus.OK
    except ApiError as error:
        status = error.status
        raise
    finally:
        exchange.close(status)
    text = whole["choices"][0]["message"]["content"] or ""
    return Reply(whole["id"], whole["system_fingerprint"], text)


def drawn_question(root: Path) -> str:
    """Draw a question of the rows to learn from, so that votes on its answers can be learnt from, too.

    Questions that are held out for the evaluation are never drawn.

    Raises:
        ApiError: there is none yet.
    """
    folder, share = root / "data" / "clean", load_params(root / pipeline.PARAMS).render.held_out
    found = list[str]()
    if (folder / "chat.parquet").is_file():
        for record in islice(read_records(folder, ("chat", "preference", "labelled")), _LOOKED_AT):
            turns = record.messages if isinstance(record, ChatExample) else ()
            if isinstance(record, PreferencePair | LabelledReply):
                turns = record.prompt
            alone = len([turn for turn in turns if turn.role != "assistant"]) == 1
            if alone and not held_out(record.split_group(), share):
                found.append(record.prompt_text())
    if not found:
        raise ApiError(HTTPStatus.CONFLICT, "There are no rows to learn from yet: `temper run` makes them.")
    return secrets.choice(found)
