"""The sections `register` and `promote` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import StringConstraints

from tasks.fields import NotNegative, Section


class Register(Section):
    """The name in the MLflow registry."""

    model: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """All methods of this file are versions of it."""


class Promote(Section):
    """What a challenger must show."""

    metric: Literal["exact_match", "loss"]
    """On the held-out rows; the loss is per token."""
    margin: NotNegative
    """How much worse than the champion the challenger may be, in the metric's own unit."""
