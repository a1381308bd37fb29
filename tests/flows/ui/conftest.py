"""A team's workspace: three versions, of which the first is champion, and rows in quarantine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.registered import made, model_and_sources, workspace_at
from flows.registry.promotion import promote
from tasks.register.stage import register
from tests.flows.ui.team import Team, quarantine_some

RIGHT = {"1": 150, "2": 190, "3": 20}
"""How many of 200 held-out rows each version answers: the second is better than the first, the third passes no gate."""


@pytest.fixture(scope="package")
def registered(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose first version is champion; tests only copy it."""
    folder = tmp_path_factory.mktemp("registered")
    workspace = workspace_at(folder / "workspace")
    for number, right in RIGHT.items():
        (folder / number).mkdir()
        outputs = made(folder / number, pico_base, right)
        register(workspace, "qlora", outputs, f"content-{number}", *model_and_sources(workspace))
    promote(workspace, "1", "the first")
    quarantine_some(workspace)
    return workspace


@pytest.fixture
def workspace(registered: Path, tmp_path: Path) -> Path:
    """A copy of it, with artifacts of its own."""
    target = tmp_path / "workspace"
    shutil.copytree(registered, target)
    return target


@pytest.fixture
def team(workspace: Path, tmp_path: Path) -> Iterator[Team]:
    """The pages of the workspace, with a key for each role, a record, and no model."""
    with Team.at(workspace, tmp_path / "said.db") as team:
        yield team
