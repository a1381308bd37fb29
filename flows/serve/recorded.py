"""What the readers of a record have in common: routes, whose a conversation is, which votes count, times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from flows.serve.record import Conversation, Vote

DAY_S = 86_400.0

SERVED, CANARY, SHADOW = "served", "canary", "shadow"
"""Routes: an answer of the last was seen by nobody."""
EVALUATION = "evaluation"
"""The endpoint of answers to items that models are evaluated with, which people compare; no request has it."""


def unit_of(said: Conversation) -> str:
    """Return what a canary's share is drawn by: the user, or the conversation by its first message.

    What people say of answers of one unit is not independent, so it stands together where it is counted.
    """
    if said.user:
        return said.user
    turns = [turn for turn in said.prompt if isinstance(turn, Mapping)]
    opening = next((turn for turn in turns if turn.get("role") == "user"), turns[0] if turns else None)
    return content_of(opening)[0] if opening else json.dumps(said.prompt)


def content_of(turn: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the text of a turn or an answer, and the functions that it calls, without the ids of its calls."""
    text = turn.get("content") or turn.get("text") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in text)
    return text, [call.get("function") for call in turn.get("tool_calls") or ()]


def last_votes(votes: Iterable[Vote]) -> list[Vote]:
    """List the last vote of each client on each answer, of each kind and of each pair, in their order."""
    last: dict[tuple[str, ...], Vote] = {}
    for vote in votes:
        of = sorted((vote.id, vote.value)) if vote.kind == "preferred_over" else [vote.id]  # whichever was preferred
        about = (vote.key_name, vote.kind, *of)
        last.pop(about, None)
        last[about] = vote
    return list(last.values())


def date_of(seconds: float) -> str:
    """Return a time, in seconds since 1970, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
