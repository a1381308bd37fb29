"""Two versions side by side on the items that both answered: what people prefer is kept in the record.

Items measure the models, so nobody learns from them: `temper feedback` leaves these votes out and counts them. They
are evidence for whoever approves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from flows.registry.evidence import evaluated_items
from flows.serve.errors import ApiError
from flows.serve.record import Conversation, Record, Vote
from flows.serve.recorded import EVALUATION
from flows.serve.requests import FeedbackRequest
from tasks.core import pipeline
from tasks.core.errors import BadParams
from tasks.core.layout import EXAMPLES
from tasks.orchestration.params import load_params
from tasks.registry import names as tag
from tasks.registry.client import answering, connect_to_read
from tasks.registry.versions import version_of
from tasks.reports.items import Item


class Pair(NamedTuple):
    """What two versions of a model answered to one item.

    Attributes:
        name: of the item, the same for all versions.
        model: the registered model's name.
        answers: by the version's number, in the order that was asked for.
    """

    name: str
    model: str
    answers: Mapping[str, Item]

    @property
    def item(self) -> Item:
        """The first version's, of which suite, task, prompt and target are those of both."""
        return next(iter(self.answers.values()))


class Tally(NamedTuple):
    """How many votes each of two versions has, by its number; of a client's votes on an item the last one counts."""

    votes: Mapping[str, int]

    @property
    def total(self) -> int:
        """All votes."""
        return sum(self.votes.values())


def pairs(workspace: Path, first: str, second: str) -> list[Pair]:
    """List the items that two versions answered differently: those whose scores differ most first.

    Raises:
        BadParams: there is no such version, or its report cannot be read.
    """
    if first == second:
        raise BadParams("is one version", where=f"versions {first} and {second}", expected="two")
    model = load_params(workspace / pipeline.PARAMS).register_.model
    one, other = (_items(workspace, model, number) for number in (first, second))
    found = [
        Pair(_name(key), model, {first: one[key], second: other[key]})
        for key in one.keys() & other.keys()
        if one[key].prediction != other[key].prediction
    ]
    return sorted(found, key=lambda pair: (-abs(_difference(pair)), pair.name))


def _difference(pair: Pair) -> float:
    first, second = pair.answers.values()
    return first.score - second.score


def _name(same: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(same).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _items(workspace: Path, model: str, number: str) -> Mapping[tuple[str, ...], Item]:
    client = connect_to_read(workspace)
    with answering(workspace):
        digest = version_of(client, model, number).tags.get(tag.digest_of(EXAMPLES), "")
    return _read(workspace, model, number, digest)


@lru_cache(maxsize=8)
def _read(workspace: Path, model: str, number: str, digest: str) -> Mapping[tuple[str, ...], Item]:
    """Read a version's items; its digest tells them from those of a version of the same number in another registry."""
    client = connect_to_read(workspace)
    with answering(workspace):
        items = evaluated_items(client, version_of(client, model, number), EXAMPLES)
    return {item.same: item for item in items}


# --- votes ------------------------------------------------------------------------------------------------------------


def vote(record: Record, pair: Pair, better: str, by: str) -> None:
    """Keep that somebody prefers a version's answer to the other's.

    Raises:
        BadParams: the pair has no such version.
    """
    if better not in pair.answers:
        raise BadParams("is neither of the two versions", got=better, expected=" or ".join(pair.answers))
    (other,) = pair.answers.keys() - {better}
    names = {number: _answer_name(pair, number) for number in (better, other)}
    said = FeedbackRequest(id=names[better], preferred_over=names[other])
    for _ in names:
        try:
            return record.say(said, by)
        except ApiError as error:  # an answer that nobody voted on before is not in the record yet
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            record.add(_conversation(pair, better if error.param == "id" else other, by))
    return record.say(said, by)


def _answer_name(pair: Pair, number: str) -> str:
    return f"item-{pair.name}-{pair.model}/{number}"


def _conversation(pair: Pair, number: str, by: str) -> Conversation:
    item = pair.answers[number]
    return Conversation(
        id=_answer_name(pair, number),
        key_name=by,
        endpoint=EVALUATION,
        model=pair.model,
        version=f"{pair.model}/{number}",
        adapter=None,
        route=EVALUATION,
        prompt=[{"role": "user", "content": item.prompt}],
        tools=(),
        options={},
        answers=[{"role": "assistant", "content": item.prediction, "finish_reason": "stop"}],
        prompt_tokens=0,
        answer_tokens=0,
        first_token_s=None,
        seconds=0.0,
        user="",
        metadata={"suite": item.suite, "task": item.task, "item": item.id},
    )


def preferred(votes: Iterable[Vote], pairs: Iterable[Pair]) -> dict[str, dict[str, str]]:
    """Find the version that each client preferred last, by the item's name and then by the client's."""
    by_answer = {_answer_name(pair, number): (pair.name, number) for pair in pairs for number in pair.answers}
    found: dict[str, dict[str, str]] = {}
    for said in votes:
        if said.kind == "preferred_over" and said.id in by_answer and said.value in by_answer:
            item, number = by_answer[said.id]
            found.setdefault(item, {})[said.key_name] = number
    return found


def tally(preferences: Mapping[str, Mapping[str, str]], versions: Iterable[str]) -> Tally:
    """Count what `preferred` found."""
    given = [number for votes in preferences.values() for number in votes.values()]
    return Tally({number: given.count(number) for number in versions})
