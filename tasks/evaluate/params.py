"""The section `evaluate` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tasks.core.params import Count, Name, Section, Seed
from tasks.evaluate.suite_params import GeneralText, Suite
from tasks.inference.params import Generation
from tasks.reports.items import HELD_OUT
from tasks.reports.statistics import Resampling


class Evaluate(Section):
    """Answers to the held-out rows."""

    rows: Count = 400
    """Held-out rows to answer, at most."""
    batch_size: Count = 32
    """Rows in a forward pass."""
    max_new_tokens: Count = 256
    """Tokens in an answer, at most."""
    bootstrap_samples: Count = 2000
    """Resamples behind an interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals."""
    seed: Seed = 1
    """Of the resampling."""
    generation: Generation = Generation()
    """How answers are generated."""
    suites: dict[Name, Suite] = {}
    """What the model is asked besides, by names of your own; data/suites/ holds ready ones."""
    general_text: GeneralText | Literal["none"] = "none"
    """Text on which base and tuned model are compared, to tell what was forgotten."""

    @field_validator("suites")
    @classmethod
    def _other_than_held_out(cls, suites: dict[str, Suite]) -> dict[str, Suite]:
        if HELD_OUT in suites:
            raise ValueError(f"{HELD_OUT} is the name of the held-out rows")
        return suites

    @property
    def resampling(self) -> Resampling:
        """Return how intervals are computed."""
        return Resampling(self.bootstrap_samples, self.seed, self.confidence)
