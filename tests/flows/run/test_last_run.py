"""A note of the last run holds for as long as nothing that it was made from has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.registry.promotion import Promotion
from flows.run import last_run
from flows.run.last_run import RunReport, keep_report, unchanged_report
from tasks.orchestration.run_journal import StageResult

PASSED = Promotion("m", "2", "qlora", True, True, [])


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages that have run, a registry, and a DVC that finds nothing changed."""
    (tmp_path / ".temper").mkdir()
    (tmp_path / ".temper" / "mlflow.db").write_bytes(b"versions")
    (tmp_path / "page.html").write_text("all models")
    stages = {name: {"cmd": f"python -m tasks.{name}", "outs": [f"data/{name}"]} for name in ("ingest", "render")}
    (tmp_path / "dvc.yaml").write_text(str({"stages": stages}))
    (tmp_path / "params.yaml").write_text("promote: {margin: 0.1}")
    outs = [{"path": "data", "hash": "md5", "md5": "0" * 32, "size": 1}]
    done = {name: {"cmd": each["cmd"], "outs": outs} for name, each in stages.items()}
    (tmp_path / "dvc.lock").write_text(f"{ {'schema': '2.0', 'stages': done} }\n")
    monkeypatch.setattr(last_run, "changed_stages", lambda workspace: frozenset())
    return tmp_path


def noted(workspace: Path, promotion: Promotion | None = PASSED) -> RunReport:
    report = RunReport([StageResult("ingest", "completed", 3.0, "k")], promotion, workspace / "page.html")
    keep_report(workspace, report)
    return report


def test_what_it_says_is_what_a_run_would_say(workspace: Path) -> None:
    assert unchanged_report(workspace, True) is None
    noted(workspace)
    told = unchanged_report(workspace, True)
    assert told is not None
    assert [(each.stage, each.state) for each in told.outcomes] == [("ingest", "unchanged"), ("render", "unchanged")]
    assert told.promotion == PASSED._replace(moved=False, findings=["it is champion already"])
    assert told.comparison == workspace / "page.html"
    without = unchanged_report(workspace, False)
    assert without is not None
    assert without.promotion is None


CHANGES: dict[str, Callable[[Path], object]] = {
    "params that no stage reads": lambda w: (w / "params.yaml").write_text("promote: {margin: 0.2}"),
    "a stage": lambda w: (w / "dvc.yaml").write_text((w / "dvc.yaml").read_text().replace("render", "merge")),
    "what a stage made": lambda w: (w / "dvc.lock").write_text((w / "dvc.lock").read_text().replace("0", "1")),
    "the registry": lambda w: (w / ".temper" / "mlflow.db").write_bytes(b"a champion more"),
    "no registry": lambda w: (w / ".temper" / "mlflow.db").unlink(),
    "no page": lambda w: (w / "page.html").unlink(),
    "a note that was cut": lambda w: (w / ".temper" / "last-run.json").write_text('{"champion": null'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_a_change_one_has_to_look(workspace: Path, change: Callable[[Path], object]) -> None:
    noted(workspace)
    change(workspace)
    assert unchanged_report(workspace, True) is None


def test_what_dvc_finds_changed_has_to_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted(workspace)
    monkeypatch.setattr(last_run, "changed_stages", lambda workspace: frozenset(["render"]))
    assert unchanged_report(workspace, True) is None


def test_a_moved_workspace_and_a_registry_elsewhere_are_looked_at(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted(workspace)
    moved = workspace.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    assert unchanged_report(moved, True) is None
    noted(moved)
    assert unchanged_report(moved, True) is not None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert unchanged_report(moved, True) is None


def test_code_of_temper_that_was_written_since_has_to_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = workspace / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr("flows.run.last_run.flows.__file__", str(package / "__init__.py"))
    noted(workspace)
    assert unchanged_report(workspace, True) is not None
    os.utime(package / "__init__.py", ns=(1, 1))
    assert unchanged_report(workspace, True) is None


@pytest.mark.parametrize("promotion", [PASSED._replace(passed=False), PASSED._replace(champion=None)])
def test_a_version_that_did_not_pass_is_judged_again(workspace: Path, promotion: Promotion) -> None:
    noted(workspace)
    noted(workspace, promotion)
    assert unchanged_report(workspace, True) is None
    assert unchanged_report(workspace, False) is None
    noted(workspace, None)  # of a run that was not to promote: one that is has to look
    assert unchanged_report(workspace, True) is None
    assert unchanged_report(workspace, False) is not None
