"""Tasks of lm-eval: run through its own `simple_evaluate`, with its templates in a sandbox and data from this disk.

For the time of a call, two names of lm-eval's world are ours: the Jinja environment that it renders all templates with
(`lm_eval.utils.env`, unsandboxed in 0.4.13), and `datasets.load_dataset`, so that a task gets the data that params
name and nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import BadData, BadParams, did_you_mean
from tasks.core.hub import snapshot
from tasks.evaluate.jinja_sandbox import Environment
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.requests import Request, reply_figures
from tasks.evaluate.suite_params import HubData, MirrorData
from tasks.reports.items import Item, Summary, prompt_digest
from tasks.tokenization.chat_template import chat_text

Find = Callable[..., Any]


class HarnessRun(NamedTuple):
    """Run of a suite: its name, tasks as `simple_evaluate` takes them, and how."""

    suite: str
    tasks: Sequence[str | dict[str, Any]]
    metric: str
    shots: int | str
    limit: int | None
    chat: bool
    ships: bool
    """Whether the tasks are lm-eval's own."""


def run_harness(
    wanted: HarnessRun, examinee: ModelUnderTest, find: Find
) -> tuple[list[Item], dict[tuple[str, str], Summary]]:
    """Evaluate tasks of lm-eval; return their items, and how they are summed up.

    Args:
        wanted: the tasks.
        examinee: the model that answers.
        find: gives the dataset that a task reads, called as `datasets.load_dataset` is.

    Raises:
        BadParams: a task is unknown, or has not the metric.
        BadData: its data is missing or a template cannot be used.
        BadModel: a log-probability is not finite.
    """
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=wanted.ships)
    if wanted.ships:
        _check_names([str(task) for task in wanted.tasks], manager.all_tasks)
    try:
        with confined(find):
            result = simple_evaluate(
                model=_asking(examinee, wanted.suite),
                tasks=list(wanted.tasks),
                num_fewshot=None if wanted.shots == "own" else wanted.shots,
                limit=wanted.limit,
                apply_chat_template=wanted.chat,
                fewshot_as_multiturn=wanted.chat,
                bootstrap_iters=0,
                task_manager=manager,
            )
    except TemplateError as error:
        raise BadData("a template of a task cannot be used", where=wanted.suite, got=str(error)) from error
    items, summaries = list[Item](), dict[tuple[str, str], Summary]()
    for task, samples in result["samples"].items():
        metric = _metric(task, samples, wanted.metric)
        sign = 1.0 if result["higher_is_better"][task].get(metric[0], True) is not False else -1.0
        count = examinee.counter(chat=wanted.chat)
        chosen = sorted((s for s in samples if s["filter"] == metric[1]), key=lambda s: int(s["doc_id"]))
        items += [_item(wanted.suite, task, sample, metric[0], sign, count) for sample in chosen]
        numbers = {n.partition(",")[0]: v for n, v in result["results"][task].items() if n.endswith(f",{metric[1]}")}
        figures = {n: float(v) for n, v in numbers.items() if isinstance(v, int | float) and "stderr" not in n}
        if texts := [reply for reply in (sample["resps"][0][0] for sample in chosen) if isinstance(reply, str)]:
            figures |= reply_figures(texts, count)
        cut = examinee.cut(_requests(chosen))
        summaries[wanted.suite, task] = Summary(metric[0], figures).counting("cut_requests", cut)
    return items, summaries


# --- data -------------------------------------------------------------------------------------------------------------


@contextmanager
def confined(find: Find) -> Iterator[None]:
    """Give lm-eval the sandbox for its templates, and `find` for its datasets, for the time of the block."""
    import datasets
    from lm_eval import utils

    rendering, loading = utils.env, datasets.load_dataset
    utils.env, datasets.load_dataset = Environment(), find
    try:
        yield
    finally:
        utils.env, datasets.load_dataset = rendering, loading


def dataset_finder(data: HubData | MirrorData) -> Find:
    """Build the function that finds datasets, of the hub at the commits in params or in their folders on this disk."""
    from datasets import load_dataset

    def find(path: str, name: str | None = None, **options: Any) -> Any:
        if isinstance(data, MirrorData):
            folder = Path(data.path) / path
            if not folder.is_dir():
                raise BadData(
                    "the dataset is not there",
                    where=str(folder),
                    fix=f"hf download {path} --repo-type dataset --local-dir {folder}",
                )
        elif path not in data.revisions:
            raise BadParams(
                "the tasks read a dataset whose commit is not pinned", where=path, expected="a key of data.revisions"
            )
        else:
            folder = snapshot(path, data.revisions[path], ["*"], kind="dataset")
        for unpinned in ("revision", "trust_remote_code", "token"):
            options.pop(unpinned, None)
        try:
            return load_dataset(str(folder), name=name, **options)
        except (ValueError, OSError, RuntimeError) as error:
            raise BadData("is no dataset that the task can read", where=str(folder), got=str(error)) from error

    return find


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise BadParams(
                f'unknown task "{name}"{did_you_mean(name, known)}',
                expected="a task or group of lm-eval: `lm-eval ls tasks` lists them",
            )


# --- the model --------------------------------------------------------------------------------------------------------


def _asking(examinee: ModelUnderTest, label: str) -> Any:
    """Wrap the examinee as a language model of lm-eval's."""
    from lm_eval.api.model import LM

    class Asking(LM):  # type: ignore[misc]  # lm-eval's class is untyped
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [(logp, greedy) for logp, greedy in self._replies("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return self._replies("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any) -> list[str]:
            return self._replies("generate_until", requests)

        def _replies(self, kind: str, requests: Any) -> list[Any]:
            return examinee.replies([Request(kind, request.args) for request in requests], label)

        @property
        def tokenizer_name(self) -> str:
            return examinee.journal.identity["template"]

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(examinee.tokenizer.chat_template) if chat_template else ""

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return chat_text(examinee.tokenizer, chat_history, answering=add_generation_prompt)

    return Asking()


def _requests(samples: Sequence[Mapping[str, Any]]) -> list[Request]:
    """Collect the requests that were made for some samples."""
    kinds = {1: "loglikelihood_rolling", 2: "loglikelihood"}
    return [
        Request("generate_until" if isinstance(arguments[-1], Mapping) else kinds[len(arguments)], arguments)
        for arguments in (tuple(each) for sample in samples for each in sample["arguments"])
    ]


# --- items ------------------------------------------------------------------------------------------------------------


def _metric(task: str, samples: Sequence[Mapping[str, Any]], wanted: str) -> tuple[str, str]:
    """Name and filter of the metric that is the score.

    Raises:
        BadParams: the task has it not.
    """
    name, _, filtered = wanted.partition(",")
    filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
    filtered = filtered or filters[0]
    there = samples[0]["metrics"]
    if name not in there or filtered not in filters:
        raise BadParams(
            f'gives no metric "{wanted}", so nothing can be told by it',
            where=f"task {task}",
            got=", ".join(there) + (f" (filters {', '.join(filters)})" if len(filters) > 1 else ""),
            fix="name one of these",
        )
    return name, filtered


def _item(
    suite: str, task: str, sample: Mapping[str, Any], metric: str, sign: float, count: Callable[[str, str], int]
) -> Item:
    value, arguments = sample[metric], sample["arguments"]
    if isinstance(value, tuple) and isinstance(sample["resps"][0][0], float):  # of perplexity: (logp, words or bytes)
        value, sign = value[0] / value[1], 1.0
    if not isinstance(value, int | float):
        raise BadParams(
            f'metric "{metric}" is a figure of all items together, not of each',
            where=f"task {task}",
            fix="name one that every item has, such as acc or exact_match",
        )
    target, prediction, logp, tokens = _said(sample, arguments, count)
    prompt = str(arguments[0][0]) if len(arguments[0]) > 1 else ""
    return Item(
        suite, task, str(sample["doc_id"]), prompt, prompt_digest(prompt), target, prediction,
        sign * float(value), logp, tokens,
    )  # fmt: skip


def _said(
    sample: Mapping[str, Any], arguments: Sequence[Sequence[Any]], count: Callable[[str, str], int]
) -> tuple[str, str, float, int]:
    """Target, prediction, the target's log-probability, and how many tokens that is of."""
    first = sample["resps"][0][0]
    if isinstance(first, str):
        said = sample["filtered_resps"][0]
        return _shown(sample["target"]), str(said[0] if isinstance(said, list) else said), math.nan, 0
    if isinstance(first, float):
        text = str(arguments[0][0])
        return text, "", first, count("", text)
    logps = [replies[0][0] for replies in sample["resps"]]
    endings = [str(ending) for _, ending in arguments]
    if len(endings) == 1:
        return endings[0], endings[0] if first[1] else "", logps[0], count(*arguments[0])
    shown = [str(context) for context, _ in arguments] if len(set(endings)) == 1 else endings
    prediction = shown[max(range(len(logps)), key=logps.__getitem__)].strip()
    right = _place(sample["target"], [ending.strip() for ending in endings])
    if right is None:
        return _shown(sample["target"]), prediction, math.nan, 0
    return shown[right].strip(), prediction, logps[right], count(*arguments[right])


def _place(target: Any, endings: Sequence[str]) -> int | None:
    if isinstance(target, list):
        target = target[0] if target else None
    if isinstance(target, int):
        return target if 0 <= target < len(endings) else None
    return endings.index(str(target).strip()) if endings.count(str(target).strip()) == 1 else None


def _shown(target: Any) -> str:
    return str(target[0]) if isinstance(target, list) and target else str(target)
