"""Tasks of one's own in lm-eval's form, read as data: what would import, fetch or run something is refused.

Of lm-eval's keys those are taken that say what a question is; its rows come out of files beside the task, through
temper's own readers. Templates run in the sandbox (`tasks/evaluate/lm_eval_tasks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.errors import BadData, BadParams, did_you_mean
from tasks.core.params_file import read_yaml
from tasks.readers.files import read_rows_of

TASK_METRICS = (
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "bits_per_byte", "byte_perplexity", "exact_match",
    "perplexity", "word_perplexity",
)  # fmt: skip
"""Metrics that lm-eval itself computes; any other name it would look up on a network, and run what it finds."""

AGGREGATIONS = ("mean", "median", "perplexity", "weighted_perplexity", "bits_per_byte")
FILTERS = ("lowercase", "majority_vote", "map", "regex", "remove_whitespace", "take_first", "take_first_k", "uppercase")

RUNS_CODE = ("class", "custom_dataset", "include", "process_docs", "process_results", "unsafe_code", "use_prompt")

_TEMPLATES = {"doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix"}
_PLAIN = {
    "task", "tag", "output_type", "training_split", "validation_split", "test_split", "fewshot_split", "num_fewshot",
    "target_delimiter", "fewshot_delimiter", "generation_kwargs", "repeats", "should_decontaminate", "metadata",
    "task_alias",
}  # fmt: skip
_READ_HERE = {"dataset_path", "dataset_kwargs", "metric_list", "filter_list"}
KEYS = _TEMPLATES | _PLAIN | _READ_HERE


def read_task_file(path: Path) -> dict[str, Any]:
    """Read a task as `simple_evaluate` takes it.

    Args:
        path: the YAML file. Its `dataset_kwargs.data_files` names, for each split, a file of rows below its folder.

    Raises:
        BadParams: the file has YAML tags (such as `!function`) or aliases, keys that would run code, unknown keys, or
            metrics and filters other than lm-eval's own.
        BadData: a file of rows is missing, damaged, or outside the folder.
    """
    content = {str(key): builtin_types(value) for key, value in read_yaml(path).items()}
    _check_keys(content, path)
    _check_lists(content, path)
    splits = _splits(content, path)
    kept = {key: value for key, value in content.items() if key not in ("dataset_path", "dataset_kwargs", "metadata")}

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return {**kept, "custom_dataset": dataset}


def _check_keys(content: Mapping[str, Any], path: Path) -> None:
    if asks := [key for key in RUNS_CODE if key in content]:
        raise BadParams(
            "asks to run code or to read another file; a task file is data",
            where=str(path),
            got=", ".join(asks),
            fix="remove these keys",
        )
    wrong = [f"{key}: unknown key{did_you_mean(key, sorted(KEYS))}" for key in sorted(content.keys() - KEYS)]
    wrong += [f"{key}: is missing" for key in ("task", "dataset_kwargs", "metric_list") if key not in content]
    wrong += [
        f"{key}: is no text" for key in _TEMPLATES & content.keys() if not isinstance(content[key], str | list | int)
    ]
    if wrong:
        raise BadParams("is no task that can be read as data", where=str(path), examples=wrong)


def _check_lists(content: Mapping[str, Any], path: Path) -> None:
    """Metrics, their aggregations and filters are named, and of lm-eval's own."""
    wrong = []
    for place, metric in enumerate(_mappings(content["metric_list"], "metric_list", path)):
        wrong += _unknown(f"metric_list.{place}.metric", metric.get("metric"), TASK_METRICS)
        if "aggregation" in metric:
            wrong += _unknown(f"metric_list.{place}.aggregation", metric["aggregation"], AGGREGATIONS)
        if metric.get("hf_evaluate"):
            wrong.append(f"metric_list.{place}.hf_evaluate: would fetch a metric and run it")
    for place, chain in enumerate(_mappings(content.get("filter_list", []), "filter_list", path)):
        for step in _mappings(chain.get("filter", []), f"filter_list.{place}.filter", path):
            wrong += _unknown(f"filter_list.{place}", step.get("function"), FILTERS)
    if wrong:
        raise BadParams("names what is not lm-eval's own", where=str(path), examples=wrong)


def _mappings(value: Any, key: str, path: Path) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise BadParams("is no list of mappings", where=f"{path}: {key}", got=repr(value)[:60])
    return value


def _unknown(key: str, name: Any, known: Sequence[str]) -> list[str]:
    if name in known:
        return []
    return [f"{key}: unknown {name!r}" + (did_you_mean(str(name), known) or f"; one of {', '.join(known)}")]


def _splits(content: Mapping[str, Any], path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of every split."""
    kwargs = content["dataset_kwargs"]
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if not isinstance(files, Mapping) or set(kwargs) != {"data_files"}:
        raise BadParams(
            "does not say which files its rows are in",
            where=f"{path}: dataset_kwargs",
            expected="data_files with a file for each split, and nothing else",
        )
    folder = path.parent.resolve()
    splits = {}
    for split, name in files.items():
        file = (folder / str(name)).resolve()
        if not file.is_relative_to(folder):
            raise BadData("leads out of the task's folder", where=f"{path}: {split}", got=str(name))
        rows = [row.value for row in read_rows_of(file)]
        if not all(isinstance(row, dict) for row in rows):
            raise BadData("is not rows with columns", where=str(file))
        splits[str(split)] = rows
    return splits


def builtin_types(value: Any) -> Any:
    """YAML nodes as builtin types."""
    if isinstance(value, Mapping):
        return {str(key): builtin_types(each) for key, each in value.items()}
    if isinstance(value, list):
        return [builtin_types(each) for each in value]
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)
