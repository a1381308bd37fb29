"""Drift of live traffic: what is asked, beside the rows that were trained on, and what is answered, beside before.

Prompts of the last days are counted as `validate` counts those of training rows (turns, characters, words, script of
all turns that are no reply), in the same bins, and compared by the population stability index. A request counts once,
whoever answered it. Answers are compared with the first days of the same version, by length, by the shares that are
cut, empty or decline, and by seconds. Chats alone are counted, as training rows are; nothing of their texts is kept.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL

from flows.run.data_page import NUMBERS
from flows.serve.record import Conversation, open_record
from flows.serve.recorded import DAY_S, SHADOW, content_of, date_of, unit_of
from tasks.core.errors import BadParams, TemperError
from tasks.gate.tallies import Tally, share_difference, tallied
from tasks.reports.statistics import Difference, Resampling
from tasks.validate.profile import EDGES, Shift, columns_of, counted, shift

if TYPE_CHECKING:
    import pyarrow as pa

LIMIT = 0.25
"""Of the stability index, beyond what chance gives: another population, by the usual reading."""
SHARE_LIMIT = 0.05
"""Of the difference of a share of the answers, where it counts."""
LEAST = 200
"""So many prompts or answers at least: under it chance alone reaches the limit where a column has many bins."""

DAYS = 7.0
"""So long are the days that are looked at, if nothing else is said: each weekday once."""
EVERY_S = 1800.0
"""How often a server looks."""

_AT_ONCE = 1024
_RESAMPLING = Resampling(2000, 1, 0.95)


class Answers(NamedTuple):
    """Answers of some days; of each share the tally by user or conversation."""

    since: float
    until: float
    lengths: Mapping[int, int]
    shares: Mapping[str, Tally]
    seconds: float | None

    @property
    def total(self) -> int:
        """Return how many there are."""
        return sum(self.lengths.values())


class AnswerDrift(NamedTuple):
    """Answers of a version now, beside its first ones.

    Attributes:
        version: what answered most.
        now: of the last days.
        first: of its first days.
        characters: how far their length moved.
        shares: how the shares that are cut, empty or decline differ; a gain is a larger share now.
    """

    version: str
    now: Answers
    first: Answers
    characters: Shift
    shares: Mapping[str, Difference]


class Drift(NamedTuple):
    """Drift of some days.

    Attributes:
        source: which record.
        since: the beginning of these days, in seconds since 1970.
        until: their end.
        prompts: how many requests were counted.
        left_out: how many were not: completions of plain text.
        columns: how far each column of the prompts moved from the training rows'.
        answers: None where the version's first days are not over, or nothing was answered.
    """

    source: str
    since: float
    until: float
    prompts: int
    left_out: int
    columns: Mapping[str, Shift]
    answers: AnswerDrift | None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        told = self.answers
        return {
            **self._asdict(),
            "since": date_of(self.since),
            "until": date_of(self.until),
            "columns": {name: each._asdict() for name, each in self.columns.items()},
            "answers": told
            and {
                "version": told.version,
                "now": _figures(told.now),
                "first": _figures(told.first),
                "characters": told.characters._asdict(),
                "shares": {name: each._asdict() for name, each in told.shares.items()},
            },
        }


def drifted(found: Drift, limit: float = LIMIT, least: int = LEAST, share_limit: float = SHARE_LIMIT) -> list[str]:
    """List what drifted, in words: nothing where nothing did, or where there are too few rows to say.

    Args:
        found: the drift.
        limit: how far beyond chance's share a stability index may be.
        least: of fewer prompts or answers nothing is said.
        share_limit: by how much a share of the answers may differ, where the difference counts.
    """
    shifts = {name.replace("_", " "): each for name, each in found.columns.items()}
    answers = found.answers
    if answers:
        shifts["answer characters"] = answers.characters
    reasons = [
        f"{name}: stability index {each.psi:.3f}, by chance {each.expected:.3f}"
        for name, each in shifts.items()
        if min(each.rows, each.rows_before) >= least and each.psi - each.expected > limit
    ]
    if answers and min(answers.now.total, answers.first.total) >= least:
        reasons += [
            f"answers {name}: {each.new:.1%}, were {each.old:.1%}"
            for name, each in answers.shares.items()
            if abs(each.counted) > share_limit
        ]
    return reasons


def drift_of(workspace: Path, place: URL, days: float = DAYS) -> Drift:
    """Compare what a record has of the last days with the rows that a workspace trained on.

    Raises:
        BadParams: nothing was validated yet, or there is no record.
        Transient: its database does not answer.
    """
    return read_drift(place, training_profile(workspace), days)


def training_profile(workspace: Path) -> dict[str, Any]:
    """Read the profile of a workspace's training rows.

    Raises:
        BadParams: nothing was validated yet, or by an earlier temper.
    """
    file = workspace / NUMBERS
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"histograms": {}}
    if not any(name.startswith("prompt_") for name in columns_of(numbers)):
        raise BadParams(
            "has no profile of the prompts that were trained on",
            where=str(file),
            fix="run `temper run`, or `dvc repro`",
        )
    return numbers


def watch_drift(workspace: Path, place: URL, told: Callable[[Drift], None], say: Callable[[str], None]) -> None:
    """Look every half hour, for as long as the process lives, in a thread that no answer waits for.

    Args:
        workspace: whose rows were trained on.
        place: of the record.
        told: is given what was found.
        say: tells why nothing could be found, in one line.
    """

    def watch() -> None:
        while True:
            try:
                told(drift_of(workspace, place))
            except TemperError as error:
                say(f"drift is not known: {error.line()}")
            time.sleep(EVERY_S)

    threading.Thread(target=watch, name="watch drift", daemon=True).start()


def read_drift(place: URL, profile: Mapping[str, Any], days: float, now: float | None = None) -> Drift:
    """Read a record of the last days, and compare it.

    Args:
        place: of the record.
        profile: of the training rows, as data/validation/profile.json has it.
        days: the length of what is looked at, and of the version's first answers.
        now: the end of these days, in seconds since 1970; without it, this moment.

    Raises:
        BadParams: there is no record.
        Transient: its database does not answer.
    """
    until = time.time() if now is None else now
    since = until - days * DAY_S
    with closing(open_record(place)) as record:
        columns, left_out, versions = prompts_of(record.conversations(since=since, until=until))
        trained = columns_of(profile)
        moved = {
            name: shift(bins, trained[name]) for name, bins in columns.items() if any(trained.get(name, {}).values())
        }
        answers = None
        if versions:
            version = max(versions, key=lambda each: versions[each])
            first = next(_chats_of(record.conversations(), version)).time
            if first + days * DAY_S <= since:
                windows = [(since, until), (first, first + days * DAY_S)]
                answers = answer_drift(
                    version, *(answers_of(record.conversations(*each), version, *each) for each in windows)
                )
        return Drift(record.place, since, until, sum(versions.values()), left_out, moved, answers)


def prompts_of(conversations: Iterable[Conversation]) -> tuple[dict[str, Mapping[Any, int]], int, Counter[str]]:
    """Count prompts in the columns of a profile; return also how many were left out, and who answered how many."""
    from tasks.validate.row_features import row_features

    columns: dict[str, Counter[Any]] = {}
    versions, left_out = Counter[str](), 0
    seen = (each for each in conversations if _seen(each))
    while block := list(islice(seen, _AT_ONCE)):
        chats = [each for each in block if each.endpoint == "chat"]
        left_out += len(block) - len(chats)
        versions.update(each.version for each in chats)
        for name, bins in columns_of(counted(row_features(_table(chats), "chat"))).items():
            if name.startswith("prompt_"):
                columns.setdefault(name, Counter()).update(bins)
    return {**columns}, left_out, versions


def answers_of(conversations: Iterable[Conversation], version: str, since: float, until: float) -> Answers:
    """Count the answers that a version gave in a chat, and that somebody saw."""
    seconds: list[float] = []
    lengths, votes = Counter[int](), dict[str, list[tuple[str, bool]]]()
    edges = EDGES["characters"]
    for each in _chats_of(conversations, version):
        seconds.append(each.seconds)
        for answer, declines in zip(each.answers, _declining(each.answers), strict=True):
            text, calls = content_of(answer)
            lengths[sum(edge <= len(text) for edge in edges) - 1] += 1
            said = {
                "cut": answer.get("finish_reason") == "length",
                "empty": not text.strip() and not calls,
                "decline": declines,
            }
            for name, it_is in said.items():
                votes.setdefault(name, []).append((unit_of(each), it_is))
    tallies = {name: tallied(each) for name, each in votes.items()}
    return Answers(since, until, lengths, tallies, statistics.median(seconds) if seconds else None)


def answer_drift(version: str, now: Answers, first: Answers) -> AnswerDrift:
    """Compare the answers of two times."""
    shares = {name: share_difference(tally, first.shares[name], _RESAMPLING) for name, tally in now.shares.items()}
    return AnswerDrift(version, now, first, shift(now.lengths, first.lengths), shares)


def _seen(said: Conversation) -> bool:
    return said.route != SHADOW


def _chats_of(conversations: Iterable[Conversation], version: str) -> Iterator[Conversation]:
    return (each for each in conversations if _seen(each) and each.version == version and each.endpoint == "chat")


def _declining(answers: Iterable[Mapping[str, Any]]) -> list[bool]:
    import pyarrow as pa

    from tasks.text.refusals import refusing

    texts = pa.array([content_of(answer)[0] for answer in answers], pa.large_string())
    return [bool(each) for each in refusing(texts)]


def _table(conversations: Iterable[Conversation]) -> pa.Table:
    """Return conversations as rows of the kind chat, their prompts alone."""
    import pyarrow as pa

    from tasks.core.parquet import record_schema
    from tasks.core.records import Message

    rows = [
        {"messages": [Message(_role(turn), content_of(turn)[0])._asdict() for turn in each.prompt], "tools": []}
        for each in conversations
    ]
    return pa.Table.from_pylist(rows, schema=record_schema("chat"))


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn["role"])
    return "system" if role == "developer" else role


def _figures(answers: Answers) -> dict[str, Any]:
    return {
        "since": date_of(answers.since),
        "until": date_of(answers.until),
        "answers": answers.total,
        "seconds": answers.seconds,
        "shares": {name: tally.as_dict() for name, tally in answers.shares.items()},
    }
