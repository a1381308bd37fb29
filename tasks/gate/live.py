"""Live evidence for the gate: what a record of conversations says of a version and of the champion beside it.

Both are looked at over the same time, from the first answer of the version on, so that no season stands between them.
The unit is what a canary's share is drawn by: the user, or, where none is named, the conversation by its first
message. Its votes count together (`tasks.gate.tallies`). What a client says of an answer is one vote, its last.

Of thumbs and of complete answers two groups of units are compared; of preferences each vote is on an answer of either.
A difference counts as it does on evaluated items: beyond its noise floor, with an interval that leaves zero out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tasks.gate.tallies import Tally


class LiveFigures(NamedTuple):
    """What a record says of one version.

    Attributes:
        answers: how many it gave, unseen ones of a shadow too.
        thumbs: up, of the thumbs that its seen answers got.
        complete: answers that say something and that no limit cut; failed ones are not recorded.
        answer_tokens: the mean of an answer; None without answers.
        seconds: the median from the request to the end of its answer.
        first_token_s: the median to the first token.
    """

    answers: int = 0
    thumbs: Tally = Tally()
    complete: Tally = Tally()
    answer_tokens: float | None = None
    seconds: float | None = None
    first_token_s: float | None = None

    def told(self) -> str:
        """Return the figures of its answers in words."""
        figures = (
            (self.answer_tokens, ".1f", "tokens"),
            (self.seconds, ".2f", "s"),
            (self.first_token_s, ".2f", "s to the first token"),
        )
        return ", ".join(
            [
                f"{self.answers} answers",
                *(f"{value:{form}} {unit}" for value, form, unit in figures if value is not None),
            ]
        )


class LiveEvidence(NamedTuple):
    """What a record says of a version and of the champion.

    Attributes:
        source: which record.
        since: the first answer of the version in the time that was looked at, as ISO 8601; empty without any.
        until: when the record was read.
        version: the version.
        champion: the champion, since then.
        preferences: votes on two answers to one conversation, one of either; yes where the version's was preferred.
        agreement: answers of the version as a shadow, yes where the champion gave the same.
    """

    source: str
    since: str
    until: str
    version: LiveFigures = LiveFigures()
    champion: LiveFigures = LiveFigures()
    preferences: Tally = Tally()
    agreement: Tally = Tally()

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON has them; the checks can be computed again from them."""

        def told(found: LiveFigures | LiveEvidence) -> dict[str, Any]:
            return {name: each.as_dict() if isinstance(each, Tally) else each for name, each in found._asdict().items()}

        return {**told(self), "version": told(self.version), "champion": told(self.champion)}
