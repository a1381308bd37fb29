"""The name that versions are registered under."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict

from tasks.core.params import Section, SourceFacts
from tasks.registry.names import registry_name


class Register(Section):
    """The name in the MLflow registry."""

    model: Annotated[str, AfterValidator(registry_name)] = "temper"
    """All methods of this file are versions of it. A-Z, a-z, 0-9, `.`, `_` and `-`, at most 100 characters."""


class LicensedSource(SourceFacts):
    """Facts about a source for a version's lineage; where its rows lie is the matter of `ingest`."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    """Of the source: file, folder, remote, hub or generator."""
