"""Suites of params as items: rows of one's own, task files, tasks of lm-eval, and ready suites of data/suites/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tasks.core.errors import BadData, BadParams
from tasks.core.params_file import read_yaml
from tasks.evaluate.lm_eval_tasks import HarnessRun, dataset_finder, run_harness
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.questions import check_digest, read_tasks
from tasks.evaluate.requests import PreparedQuestion, Prompting, build_requests, items_of
from tasks.evaluate.suite_params import (
    SHIPPED_SUITES,
    HarnessPart,
    HarnessSuite,
    MirrorData,
    Ready,
    ReadySuite,
    RowsPart,
    RowsSuite,
    Suite,
    TaskFileSuite,
    shipped_name,
)
from tasks.evaluate.task_files import builtin_types, read_task_file
from tasks.reports.items import Item, Summary, check_scores


class Results(NamedTuple):
    """Items of suites, how each task is summed up, and which parts of ready suites were skipped."""

    items: list[Item]
    summaries: dict[tuple[str, str], Summary]
    skipped: dict[str, list[str]]


def run_suites(examinee: ModelUnderTest, suites: Mapping[str, Suite]) -> Results:
    """Evaluate a model on all questions of some suites.

    Raises:
        BadParams: a suite, task or metric is unknown, or a task file is no data.
        BadData: data is missing or defective beyond the rules.
        BadModel: the model's scores are not finite.
    """
    results = Results([], {}, {})
    for name, suite in suites.items():
        limit = None if suite.limit == "none" else suite.limit
        if isinstance(suite, RowsSuite):
            found = _rows(name, suite, limit, examinee, suite.chat_template, None)
        elif isinstance(suite, TaskFileSuite):
            found = _task_file(name, suite, limit, examinee)
        elif isinstance(suite, HarnessSuite):
            found = _harness(name, suite, limit, examinee, suite.chat_template, suite.data)
        else:
            found = _ready(name, suite, limit, examinee, results.skipped)
        _add(results, found, name)
    check_scores(results.items)
    return results


SuiteResults = tuple[list[Item], dict[tuple[str, str], Summary]]


def _add(results: Results, found: SuiteResults, suite: str) -> None:
    items, summaries = found
    if twice := [task for _, task in summaries.keys() & results.summaries.keys()]:
        raise BadParams("two parts of a suite have a task of the same name", where=suite, got=", ".join(twice))
    results.items.extend(items)
    results.summaries.update(summaries)


# --- kinds ------------------------------------------------------------------------------------------------------------


def _rows(
    suite: str, part: RowsPart, limit: int | None, examinee: ModelUnderTest, chat: bool, root: Path | None
) -> SuiteResults:
    how = Prompting(examinee.chat if chat else None, examinee.counter(chat=chat))
    tasks = read_tasks(part, limit, root)
    asked: list[list[PreparedQuestion]] = [build_requests(task, part, how) for task in tasks]
    requests = [request for task in asked for each in task for request in each.requests]
    replies = iter(examinee.replies(requests, suite))
    items, summaries = list[Item](), dict[tuple[str, str], Summary]()
    for task, questions in zip(tasks, asked, strict=True):
        said = [[next(replies) for _ in each.requests] for each in questions]
        made, summary = items_of(suite, task, part, questions, said, how)
        items += made
        cut = examinee.cut([request for each in questions for request in each.requests])
        summaries[suite, task.name] = summary.counting("cut_requests", cut)
    return items, summaries


def _task_file(suite: str, params: TaskFileSuite, limit: int | None, examinee: ModelUnderTest) -> SuiteResults:
    check_digest(Path(params.path), params.sha256)
    task = read_task_file(Path(params.path))
    wanted = HarnessRun(suite, [task], params.metric, params.shots, limit, params.chat_template, ships=False)
    return run_harness(wanted, examinee, _no_dataset)


def _no_dataset(path: str, *_: Any, **__: Any) -> Any:
    raise BadData("a task file reads no dataset but its own files", got=path)


def _harness(
    suite: str, part: HarnessPart, limit: int | None, examinee: ModelUnderTest, chat: bool, data: Any
) -> SuiteResults:
    wanted = HarnessRun(suite, part.tasks, part.metric, part.shots, limit, chat, ships=True)
    return run_harness(wanted, examinee, dataset_finder(data))


def _ready(
    suite: str, params: ReadySuite, limit: int | None, examinee: ModelUnderTest, skipped: dict[str, list[str]]
) -> SuiteResults:
    how = Asking(limit, params.chat_template, skips=params.missing == "skip")
    found = examine_parts(examinee, suite, shipped(params.name), Path(params.data), how)
    skipped.update(found.skipped)
    return found.items, found.summaries


class Asking(NamedTuple):
    """Options of a ready suite's run: at most this many questions of a task, and whether to skip what is missing."""

    limit: int | None
    chat: bool
    skips: bool


def examine_parts(examinee: ModelUnderTest, suite: str, ready: Ready, root: Path, how: Asking) -> Results:
    """Evaluate a model on the questions of a ready suite, whose files lie in `root`.

    Raises:
        BadData: files are missing, and are not to be skipped, or none is there.
    """
    found, there = Results([], {}, {}), list[RowsPart | HarnessPart]()
    missing = list[str]()
    for part in ready.parts:
        lacks = _lacking(part, root)
        missing += lacks
        if not lacks:
            there.append(part)
    if missing and not (how.skips and there):
        raise BadData(
            f"lacks {len(missing)} files or datasets of the suite {suite}",
            where=str(root),
            examples=missing,
            fix="fetch them there; or go without their tasks, by `missing: skip` or `--skip-missing`",
        )
    if missing:
        found.skipped[suite] = missing
    for part in there:
        if isinstance(part, RowsPart):
            _add(found, _rows(suite, part, how.limit, examinee, how.chat, root), suite)
        else:
            mirror = MirrorData(kind="mirror", path=str(root))
            _add(found, _harness(suite, part, how.limit, examinee, how.chat, mirror), suite)
    return found


def _lacking(part: RowsPart | HarnessPart, root: Path) -> list[str]:
    """List what a part needs that the folder does not hold."""
    if isinstance(part, HarnessPart):
        return [f"{name} (hf download {name} --repo-type dataset --local-dir {root / name})"
                for name in part.datasets if not (root / name).is_dir()]  # fmt: skip
    paths = [part.path] if part.shots == "none" else [part.path, part.shots.path]
    return [path for path in paths if not (root / path).exists()]


# --- ready suites -----------------------------------------------------------------------------------------------------


def shipped(name: str) -> Ready:
    """Load a ready suite.

    Raises:
        BadParams: there is none of this name.
    """
    try:
        known = shipped_name(name)
    except ValueError as error:
        raise BadParams(str(error), fix="name one of them, or a file that is there") from error
    return read_ready(SHIPPED_SUITES / f"{known}.yaml")


def read_ready(path: Path) -> Ready:
    """Read a file in the form of data/suites/.

    Raises:
        BadParams: it is not in that form; every wrong key is named.
    """
    try:
        return Ready.model_validate(builtin_types(read_yaml(path)))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise BadParams("is no suite", where=str(path), examples=wrong) from error
