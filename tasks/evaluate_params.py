"""The section `evaluate` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tasks.fields import Count, Section, Seed
from tasks.generation_params import Generation


class Evaluate(Section):
    """Answers to the held-out rows."""

    rows: Count
    """Held-out rows to answer, at most."""
    batch_rows: Count
    """Rows in a forward pass."""
    max_new_tokens: Count
    """Tokens in an answer, at most."""
    bootstrap_samples: Count
    """Resamples behind an interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    """Of the intervals."""
    seed: Seed
    """Of the resampling."""
    generation: Generation
    """How answers are generated."""
