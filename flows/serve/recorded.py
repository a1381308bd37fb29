"""Parts of a recorded conversation that its readers count by: its route, whose it is, and what an answer says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flows.serve.record import Conversation

SERVED, CANARY, SHADOW = "served", "canary", "shadow"
"""Routes: an answer of the last was seen by nobody."""


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
