from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.core import pipeline
from tasks.core.errors import BadInput, OutOfMemory, TemperError, Transient
from tasks.orchestration.dvc_session import PipelineRun, stage_error, stage_exit_code
from tasks.orchestration.run_journal import StageResult, last_seconds, record


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["ERROR: failed to reproduce 'a': failed to run: python -m tasks.a, exited with 65"], 65),
        (["exited with 1", "ERROR: ... exited with -9"], -9),
        (["ERROR: 'data/raw' is busy, it is being blocked by:"], 75),
        (["ERROR: Unable to acquire lock. Most likely another DVC process is running"], 75),
        (["ERROR: unexpected error - [Errno 28] No space left on device: '/x'"], 75),
        (["ERROR: something else"], 255),
    ],
)
def test_the_exit_code_is_read_from_what_dvc_says(lines: list[str], code: int) -> None:
    assert stage_exit_code(lines, 255) == code


@pytest.mark.parametrize(
    ("code", "kind"),
    [(65, BadInput), (71, OutOfMemory), (75, Transient), (1, TemperError), (-9, TemperError), (255, TemperError)],
)
def test_an_exit_code_becomes_the_error_that_it_stands_for(code: int, kind: type[TemperError]) -> None:
    lines = ["Running stage", "error: params.yaml: 1 key is wrong", "  - line 3: x", "ERROR: failed to reproduce"]
    error = stage_error("train@a", code, lines)
    assert type(error) is kind
    assert str(error) == f"stage train@a failed (exit code {code})\nparams.yaml: 1 key is wrong\n  - line 3: x"


def node(name: str, deps: tuple[str, ...], outs: tuple[str, ...]) -> pipeline.Node:
    return pipeline.Node(name, "", deps, {}, outs)


def test_a_stage_is_passed_over_only_when_nothing_that_it_reads_was_written() -> None:
    nodes = {
        "ingest@a": node("ingest@a", (), ("data/raw/a",)),
        "validate": node("validate", ("data/raw",), ("data/clean",)),
        "base": node("base", ("models/tiny",), ("data/base",)),
        "render": node("render", ("data/clean", "data/base"), ("data/rendered",)),
    }
    session = PipelineRun(Path(), None, nodes, {}, frozenset({"ingest@a"}))  # type: ignore[arg-type]
    assert [session.is_current(name) for name in nodes] == [False, True, True, True]
    session.outcomes["ingest@a"] = StageResult("ingest@a", "completed", 1.0, "k")
    assert [session.is_current(name) for name in ("validate", "base", "render")] == [False, True, True]
    session.outcomes["validate"] = StageResult("validate", "unchanged", 0.0, "k")
    assert session.is_current("render")


def test_a_stage_that_neither_came_through_nor_says_why_fails_the_run() -> None:
    nodes = {name: node(name, (), (name,)) for name in ("a", "b")}
    session = PipelineRun(Path(), None, nodes, {}, frozenset())  # type: ignore[arg-type]
    session.outcomes["a"] = StageResult("a", "completed", 1.0, "k")
    with pytest.raises(TemperError, match="did not come through") as caught:
        session.check()
    assert caught.value.examples == ("b",)
    session.outcomes["b"] = StageResult("b", "unchanged", 0.0, "k")
    session.check()
    session.errors["b"] = BadInput("is wrong")
    with pytest.raises(BadInput, match="is wrong"):
        session.check()


def test_the_journal_tells_how_long_a_stage_took_when_it_last_ran(tmp_path: Path) -> None:
    (tmp_path / ".temper").mkdir()
    record(tmp_path, StageResult("a", "completed", 5.0, "k"))
    record(tmp_path, StageResult("a", "unchanged", 0.0, "k"))
    with (tmp_path / ".temper" / "journal.jsonl").open("a") as file:
        file.write('{"stage": "a", "sta\n')  # cut by a kill
    record(tmp_path, StageResult("b", "completed", 2.0, "k"))
    assert last_seconds(tmp_path) == {"a": 5.0, "b": 2.0}
    assert last_seconds(tmp_path / "elsewhere") == {}


FAKE_DVC = """#!/bin/sh
echo 'failed to run: python -m tasks.train a, exited with %s'
exit 255
"""


@pytest.mark.parametrize(
    ("code", "kills", "fit", "kind", "said"),
    [
        (-9, 1, False, OutOfMemory, "the kernel ended it: the machine's memory ran out"),
        (137, 1, False, OutOfMemory, "set train.a.fit_memory: true, or choose"),
        (-9, 1, True, Transient, "tried with half as many rows at once"),
        (-9, 0, False, TemperError, "exit code -9"),  # somebody killed it
        (71, 0, True, OutOfMemory, "exit code 71"),
        (65, 0, False, BadInput, "exit code 65"),
    ],
)
def test_a_training_that_ran_out_of_memory_is_told_apart_and_given_advice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kills: int,
    fit: bool,
    kind: type[TemperError],
    said: str,
) -> None:
    from tasks.orchestration import dvc_session

    (tmp_path / ".temper").mkdir()
    python = tmp_path / "python"
    python.write_text(FAKE_DVC % code)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    counts = iter([5, 5 + kills])
    monkeypatch.setattr(dvc_session, "kills_for_memory", lambda: next(counts))
    params = SimpleNamespace(train={"a": SimpleNamespace(fit_memory=fit)})
    session = PipelineRun(tmp_path, params, {}, {}, frozenset(), advise=lambda method: f"  fits: less of {method}")  # type: ignore[arg-type]
    with closing(session), pytest.raises(kind) as caught:
        session.run("train@a", 10, lambda line: None)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert ("fits: less of a" in str(caught.value)) == (kind is OutOfMemory)
    with pytest.raises(kind):
        session.check()


def test_another_stage_that_runs_out_of_memory_is_told_without_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.orchestration import dvc_session

    (tmp_path / ".temper").mkdir()
    python = tmp_path / "python"
    python.write_text(FAKE_DVC % -9)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    counts = iter([0, 1])
    monkeypatch.setattr(dvc_session, "kills_for_memory", lambda: next(counts))
    session = PipelineRun(tmp_path, None, {}, {}, frozenset(), advise=lambda method: 1 / 0)  # type: ignore[arg-type,return-value]
    with closing(session), pytest.raises(OutOfMemory, match="take a machine with more"):
        session.run("merge@a", 10, lambda line: None)
