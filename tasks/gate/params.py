"""The sections `register` and `promote` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tasks.core.params import Count, NotNegative, Positive, Section, Seed, Share
from tasks.reports.items import HELD_OUT
from tasks.reports.statistics import Resampling

SuiteName = Annotated[str, StringConstraints(min_length=1)]


class LiveCheck(Section):
    """One figure of live answers, of a version beside the champion."""

    use: Literal["ignored", "taken", "demanded"] = "ignored"
    """`taken`: a version that is clearly worse is refused. `demanded`: also one of which too few people said
    something, or so few that a loss would not be seen (`max_noise`)."""
    margin: NotNegative = 0.0
    """How much worse the share may be than the champion's."""


class Live(Section):
    """What the gate takes from the record of `temper serve`: `--record`, or TEMPER_RECORD."""

    thumbs: LiveCheck = LiveCheck()
    """The share of thumbs that are up."""
    preferences: LiveCheck = LiveCheck()
    """How often the version's answer was preferred, of votes on one of its answers and one of the champion's."""
    complete: LiveCheck = LiveCheck()
    """The share of answers that say something and that no limit of tokens cut."""
    min_agreement: Share = 0.0
    """The least share of a shadow's answers that are the champion's own; 0: any."""
    days: Positive = 30.0
    """So far back the record is read, and not beyond the version's first answer."""
    least: Count = 50
    """So many users, or conversations of nobody named, must have said something of either."""
    max_noise: Positive = 0.2
    """Where a check is demanded, and nothing counts: a noise floor that is higher hides too much."""

    @property
    def asked(self) -> bool:
        """Return whether anything of the record is asked for."""
        checks = (self.thumbs, self.preferences, self.complete)
        return self.min_agreement > 0 or any(each.use != "ignored" for each in checks)


class Promote(Section):
    """Conditions that a challenger must meet: figures are of items, paired where two models answered the same."""

    suite: SuiteName = HELD_OUT
    """The suite that decides: there a version must be better than the base, and not worse than the champion."""
    metric: Literal["score", "loss"] = "loss"
    """Of the deciding suite: the score of its items (exact match, of held-out rows), or the loss per
    token, which fits answers that have no single right form."""
    margin: NotNegative = 0.0
    """How much worse than the champion a version may be on the deciding suite, in the metric's own unit."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the bootstrap interval of a difference, and of the noise floor."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind either."""
    seed: Seed = 1
    """Of the resampling."""
    max_noise: Positive = 0.5
    """A comparison whose noise floor is higher, as with few items, tells nothing: the gate stays shut."""
    floors: dict[SuiteName, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """The least mean score, by suite."""
    guarded: dict[SuiteName, NotNegative] = {}
    """How much worse than the champion (the base, where there is none) the mean score may be, by suite."""
    max_contamination: Share = 0.0
    """The share of a suite's items that may stand in the training rows; of every suite named above."""
    live: Live = Live()
    """What people said of live answers; nothing of it, unless something is asked for here."""
    approval: Literal["none", "human"] = "none"
    """`human`: a version that passed waits in Prefect until somebody approves of it."""
    approval_timeout_s: Count = 86400
    """So long it waits."""

    @property
    def resampling(self) -> Resampling:
        """Return how intervals are computed."""
        return Resampling(self.bootstrap_samples, self.seed, self.confidence)
