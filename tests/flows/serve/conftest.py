"""A workspace with versions to serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.flows.serve.registry import give, three_versions


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
