"""Building blocks of params sections: the base class, and the types that many keys share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
FilePath = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f]+$")]
HUB_NAME, COMMIT = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$", r"^[0-9a-f]{40}$"
HubName = Annotated[str, StringConstraints(pattern=HUB_NAME)]
Commit = Annotated[str, StringConstraints(pattern=COMMIT)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """One mapping of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class HeldOut(Section):
    """The share of rows that no training sees."""

    held_out: Share = 0.1
    """The share of groups that is kept for evaluation; which ones is a fixed function of their names."""


class SourceFacts(Section):
    """Facts about a source of rows, whatever its kind: their use and licence."""

    use: Literal["train", "benchmark"] = "train"
    """Rows to learn from, or questions of a benchmark that no row to learn from may contain."""
    licence: Annotated[str, StringConstraints(min_length=1)] = "unknown"
    """What the rows may be used for, as an SPDX name; noted in the manifest."""
