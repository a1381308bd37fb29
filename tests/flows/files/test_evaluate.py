"""`temper evaluate` by its real command line, on plain folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.files.evaluate import Wanted, evaluate, resolve
from tasks.core.errors import BadData, BadInput
from tasks.evaluate.suite_params import Ready, RowsSuite, TaskFileSuite
from tasks.reports.items import read_items
from tests.flows.files.test_inspect import command
from tests.helpers.samples import write_lines
from tests.tasks.evaluate.test_suites import ANIMALS
from tests.tasks.evaluate.test_task_files import GOOD, HOSTILE, write


def wanted(suite: Path | str, **changes: Any) -> Wanted:
    given = Wanted("m", str(suite), None, "none", False, None, 3, False, False, None)
    return given._replace(**changes)


def test_a_file_of_rows_is_asked_and_the_report_written_again_is_the_same(pico_base: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "some animals.jsonl", ANIMALS)
    words = ("evaluate", str(pico_base), "--suite", str(rows), "--out", "a report", "--json")
    done = command(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cost = found.pop("cost")
    assert cost["tokens_per_s"] == pytest.approx(cost["tokens"] / cost["seconds"])
    task = found["suites"]["some animals"]["tasks"]["some animals"]
    assert (task["metric"], task["rows"]) == ("accuracy_per_character", 5)
    report = tmp_path / "a report"
    assert json.loads((report / "metrics.json").read_text()) == found
    assert len(read_items(report / "examples.parquet")) == 5
    before = [(report / name).read_bytes() for name in ("metrics.json", "examples.parquet")]
    again = command(tmp_path, *words)
    assert json.loads(again.stdout) == found  # all is known: it costs nothing
    assert [(report / name).read_bytes() for name in ("metrics.json", "examples.parquet")] == before


@pytest.mark.parametrize(
    ("row", "metric", "columns"),
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 1}, "choice", {"question", "choices", "answer"}),
        ({"question": "q", "A": "1", "B": "2", "answer": "A"}, "choice", {"question", "choices", "answer"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", {"question", "chosen", "rejected"}),
        ({"context": "q", "continuation": "a"}, "loglikelihood", {"question", "answer"}),
        ({"question": "q", "answer": "a"}, "generate", {"question", "answer"}),
        ({"text": "t"}, "perplexity", {"text"}),
    ],
)
def test_columns_tell_what_is_asked(tmp_path: Path, row: dict[str, Any], metric: str, columns: set[str]) -> None:
    name, suite = resolve(wanted(write_lines(tmp_path / "f.jsonl", [row])))
    assert isinstance(suite, RowsSuite)
    assert (name, suite.metric.name, set(suite.columns), suite.limit) == ("f", metric, columns, 3)


def test_columns_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="the columns do not tell what is asked"):
        resolve(wanted(write_lines(tmp_path / "f.jsonl", [{"a": 1, "b": 2}])))


def test_a_yaml_file_is_a_task_a_suite_or_several_parts(tmp_path: Path) -> None:
    _, task = resolve(wanted(write(tmp_path, GOOD)))
    assert isinstance(task, TaskFileSuite)
    assert task.metric == "acc"
    _, own = resolve(wanted(write_lines(tmp_path / "f.jsonl", [{"text": "t"}])))
    assert isinstance(own, RowsSuite)
    part = own.model_dump(exclude={"limit", "chat_template"})
    (tmp_path / "one.yaml").write_text(json.dumps(part))
    assert resolve(wanted(tmp_path / "one.yaml")) == ("one", own)
    about = {"about": "a", "source": "s", "licence": "l", "parts": [part]}
    (tmp_path / "several.yaml").write_text(json.dumps(about))
    assert isinstance(resolve(wanted(tmp_path / "several.yaml"))[1], Ready)


@pytest.mark.parametrize(
    ("suite", "changes", "said"),
    [
        ("gsm8k", {}, "this suite needs to know where its files are"),
        ("gsm8k", {"data": Path()}, "lacks 2 files or datasets of the suite gsm8k"),
        ("rows.jsonl", {"quantization": "nf5"}, "is no form of a base"),
        ("rows.jsonl", {"adapter": Path("task")}, "is no adapter"),
        ("rows.jsonl", {"model": "task"}, "is not a model folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_nothing_is_written(
    pico_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suite: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    write(tmp_path, GOOD)
    write_lines(tmp_path / "rows.jsonl", ANIMALS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=said) as refused:
        evaluate(wanted(suite, **{"model": str(pico_base), "out": tmp_path / "report", **changes}))
    assert refused.value.exit_code == 65
    assert not {"metrics.json", "examples.parquet"} & {file.name for file in tmp_path.glob("report/*")}


@pytest.mark.parametrize(
    ("suite", "said"),
    [("gsm8", 'no suite "gsm8" is shipped; did you mean "gsm8k"?'), ("task/mine.yaml", "a YAML tag is not allowed")],
)
def test_what_cannot_be_asked_ends_with_one_block(pico_base: Path, tmp_path: Path, suite: str, said: str) -> None:
    write(tmp_path, HOSTILE["a function"])
    done = command(tmp_path, "evaluate", str(pico_base), "--suite", suite, "--out", "report")
    assert done.returncode == 65, done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not (tmp_path / "report").exists()
