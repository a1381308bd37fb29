"""A workspace with versions to serve, and databases to record in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from flows.serve.record_database import url_of
from tests.flows.serve.registry import give, three_versions
from tests.helpers.postgresql import Cluster, cluster


@pytest.fixture(scope="package")
def registered(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with three versions and no champion; tests only copy it."""
    return three_versions(tmp_path_factory.mktemp("registered"), pico_base)


@pytest.fixture
def workspace(registered: Path, tmp_path: Path) -> Path:
    """A copy of it, with artifacts of its own; version 1 is champion."""
    target = tmp_path / "workspace"
    shutil.copytree(registered, target)
    give(target, champion=1)
    return target


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    """A PostgreSQL server."""
    with cluster() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """Where a record can be made, in each kind of database."""
    if request.param == "sqlite":
        return url_of(tmp_path / "said.db")
    running: Cluster = request.getfixturevalue("postgresql")
    return running.database()
