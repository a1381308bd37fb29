from __future__ import annotations

from pathlib import Path

import pytest

from tasks import graph
from tasks.errors import BadInput, TemperError, Transient
from tasks.runner import Outcome, Session, last_seconds, record, stage_error, stage_exit_code


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
    ("code", "kind"), [(65, BadInput), (75, Transient), (1, TemperError), (-9, TemperError), (255, TemperError)]
)
def test_an_exit_code_becomes_the_error_that_it_stands_for(code: int, kind: type[TemperError]) -> None:
    lines = ["Running stage", "error: params.yaml: 1 key is wrong", "  - line 3: x", "ERROR: failed to reproduce"]
    error = stage_error("train@a", code, lines)
    assert type(error) is kind
    assert str(error) == f"stage train@a failed (exit code {code})\nparams.yaml: 1 key is wrong\n  - line 3: x"


def node(name: str, deps: tuple[str, ...], outs: tuple[str, ...]) -> graph.Node:
    return graph.Node(name, "", deps, {}, outs)


def test_a_stage_is_passed_over_only_when_nothing_that_it_reads_was_written() -> None:
    nodes = {
        "ingest@a": node("ingest@a", (), ("data/raw/a",)),
        "validate": node("validate", ("data/raw",), ("data/clean",)),
        "base": node("base", ("models/tiny",), ("data/base",)),
        "render": node("render", ("data/clean", "data/base"), ("data/rendered",)),
    }
    session = Session(Path(), None, nodes, {}, frozenset({"ingest@a"}))  # type: ignore[arg-type]
    assert [session.is_current(name) for name in nodes] == [False, True, True, True]
    session.outcomes["ingest@a"] = Outcome("ingest@a", "completed", 1.0, "k")
    assert [session.is_current(name) for name in ("validate", "base", "render")] == [False, True, True]
    session.outcomes["validate"] = Outcome("validate", "unchanged", 0.0, "k")
    assert session.is_current("render")


def test_a_stage_that_neither_came_through_nor_says_why_fails_the_run() -> None:
    nodes = {name: node(name, (), (name,)) for name in ("a", "b")}
    session = Session(Path(), None, nodes, {}, frozenset())  # type: ignore[arg-type]
    session.outcomes["a"] = Outcome("a", "completed", 1.0, "k")
    with pytest.raises(TemperError, match="did not come through") as caught:
        session.check()
    assert caught.value.examples == ("b",)
    session.outcomes["b"] = Outcome("b", "unchanged", 0.0, "k")
    session.check()
    session.errors["b"] = BadInput("is wrong")
    with pytest.raises(BadInput, match="is wrong"):
        session.check()


def test_the_journal_tells_how_long_a_stage_took_when_it_last_ran(tmp_path: Path) -> None:
    (tmp_path / ".temper").mkdir()
    record(tmp_path, Outcome("a", "completed", 5.0, "k"))
    record(tmp_path, Outcome("a", "unchanged", 0.0, "k"))
    with (tmp_path / ".temper" / "journal.jsonl").open("a") as file:
        file.write('{"stage": "a", "sta\n')  # cut by a kill
    record(tmp_path, Outcome("b", "completed", 2.0, "k"))
    assert last_seconds(tmp_path) == {"a": 5.0, "b": 2.0}
    assert last_seconds(tmp_path / "elsewhere") == {}
