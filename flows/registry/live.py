"""Live evidence for the gate, counted from a record of conversations; what is counted how, `tasks.gate.live` says."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple

from sqlalchemy import URL

from flows.serve.record import Conversation, Vote, open_record
from flows.serve.recorded import DAY_S, EVALUATION, SHADOW, content_of, date_of, last_votes, unit_of
from tasks.gate.live import LiveEvidence, LiveFigures
from tasks.gate.tallies import tallied


def read_live_evidence(place: URL, version: str, champion: str, days: float) -> LiveEvidence:
    """Read what a record of the last days says of two versions.

    Args:
        place: of the record.
        version: as responses name it: NAME/VERSION.
        champion: as responses name it.
        days: so far back.

    Raises:
        BadParams: there is no record.
        Transient: its database does not answer.
    """
    now = time.time()
    with closing(open_record(place)) as record:
        votes = list(record.votes(since=now - days * DAY_S))  # first: by now what they are of is there
        conversations = record.conversations(since=now - days * DAY_S)
        return live_evidence(conversations, votes, version, champion, source=record.place, until=now)


def live_evidence(
    conversations: Iterable[Conversation],
    votes: Iterable[Vote],
    version: str,
    champion: str,
    *,
    source: str,
    until: float,
) -> LiveEvidence:
    """Count what conversations and votes say of two versions, since the first answer of the one.

    Left out are answers of adapters on the versions, those to items that models are evaluated with, and thumbs on a
    shadow's answers: who gave them has seen what the user has not.

    Args:
        conversations: the oldest first.
        votes: in the order in which they were given.
        version: as responses name it.
        champion: as responses name it.
        source: names the record.
        until: when it was read, in seconds since 1970.
    """
    since = ""
    answers: dict[str, _Answer] = {}
    for each in conversations:
        if each.adapter is not None or each.endpoint == EVALUATION or each.version not in (version, champion):
            continue
        if each.version == version:
            since = since or date_of(each.time)
        if since:
            answers[each.id] = _answer(each)
    counted = last_votes(votes)
    thumbs = [(vote.id, vote.value == "up") for vote in counted if vote.kind == "thumb"]
    preferred = [(vote.id, vote.value) for vote in counted if vote.kind == "preferred_over"]
    seen = [(answers[name], up) for name, up in thumbs if name in answers and answers[name].route != SHADOW]
    compared = [(answers[one], answers[other]) for one, other in preferred if one in answers and other in answers]
    shadows = [
        (each, answers[served])
        for name, each in answers.items()
        if each.route == SHADOW and (served := name.removesuffix(f"-{SHADOW}")) in answers
    ]

    def figures(of: str) -> LiveFigures:
        own = [each for each in answers.values() if each.version == of]
        return LiveFigures(
            answers=len(own),
            thumbs=tallied((each.unit, up) for each, up in seen if each.version == of),
            complete=tallied((each.unit, complete) for each in own for complete in each.complete),
            answer_tokens=statistics.fmean(each.tokens for each in own) if own else None,
            seconds=_median(each.seconds for each in own),
            first_token_s=_median(each.first_token_s for each in own),
        )

    return LiveEvidence(
        source=source,
        since=since,
        until=date_of(until),
        version=figures(version),
        champion=figures(champion),
        preferences=tallied(
            (one.unit, one.version == version)
            for one, other in compared
            if {one.version, other.version} == {version, champion}
        ),
        agreement=tallied(
            (each.unit, each.content == served.content)
            for each, served in shadows
            if (each.version, served.version) == (version, champion)
        ),
    )


class _Answer(NamedTuple):
    """What is kept of a conversation while votes are counted: no text."""

    version: str
    route: str
    unit: str
    complete: tuple[bool, ...]
    content: str
    tokens: int
    seconds: float
    first_token_s: float | None


def _answer(said: Conversation) -> _Answer:
    contents = [content_of(each) for each in said.answers]
    return _Answer(
        version=said.version,
        route=said.route,
        unit=_digest(unit_of(said)),
        complete=tuple(
            bool(text.strip() or calls) and each.get("finish_reason") != "length"
            for (text, calls), each in zip(contents, said.answers, strict=True)
        ),
        content=_digest(contents),
        tokens=said.answer_tokens,
        seconds=said.seconds,
        first_token_s=said.first_token_s,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
