"""Evaluation by `temper evaluate`: any model folder on any suite, without a workspace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from flows.files.inspect import nearest_params
from tasks.core import pipeline
from tasks.core.errors import BadData, BadParams
from tasks.core.params_file import read_yaml
from tasks.evaluate.suite_params import Ready, RowsSuite, Suite
from tasks.evaluate.task_files import builtin_types
from tasks.readers.files import read_rows_of

MOST_ANSWER_TOKENS = 64


class Wanted(NamedTuple):
    """Model and suite of an evaluation; see the options of the command."""

    model: str
    suite: str
    adapter: Path | None
    quantization: str
    any_base: bool
    data: Path | None
    limit: int | None
    chat: bool
    skip_missing: bool
    out: Path | None
    workspace: Path | None = None


def evaluate(wanted: Wanted) -> dict[str, Any]:
    """Evaluate a model; with `out`, write the report there, whole or not at all.

    Returns:
        What metrics.json holds (`model`, `template_sha256` and `suites`), and, unless all answers were known, `cost`,
        which depends on the machine and so is no part of the report.

    Raises:
        BadInput: the model, its adapter or the suite cannot be used.
    """
    from flows.run.locate import REGISTRY_SCHEME, local_model
    from tasks.core.artifacts import as_json, atomic_write, check_manifest
    from tasks.core.layout import EXAMPLES, METRICS
    from tasks.evaluate.metrics import cost_of
    from tasks.evaluate.model_under_test import ModelUnderTest
    from tasks.evaluate.suites import Asking, examine_parts, run_suites
    from tasks.reports.items import check_scores, suite_metrics, write_items
    from tasks.tokenization.chat_template import template_digest

    name, suite = resolve(wanted)
    root = wanted.data or Path()
    if isinstance(suite, Ready) and wanted.data is None:
        raise BadParams("this suite needs to know where its files are", where=name, fix="say --data FOLDER")
    folder = local_model(wanted.model, wanted.workspace)
    if wanted.adapter:
        check_manifest(wanted.adapter)
    params = nearest_params().evaluate
    examinee = ModelUnderTest(
        folder,
        params,
        _journals(wanted.out),
        chats=wanted.chat,
        adapter=wanted.adapter,
        quantized_for=_quantized_for(wanted.quantization),
        any_base=wanted.any_base,
    )
    if isinstance(suite, Ready):
        how = Asking(wanted.limit, wanted.chat, skips=wanted.skip_missing)
        found = examine_parts(examinee, name, suite, root, how)
    else:
        found = run_suites(examinee, {name: suite})
    check_scores(found.items)
    metrics = {
        "model": wanted.model if wanted.model.startswith(REGISTRY_SCHEME) else folder.name,
        "template_sha256": template_digest(examinee.tokenizer),
        "suites": _with_skipped(suite_metrics(found.items, found.summaries, params.resampling), found.skipped),
    }
    if wanted.out:
        wanted.out.mkdir(parents=True, exist_ok=True)
        write_items(wanted.out / EXAMPLES, found.items)
        atomic_write(wanted.out / METRICS, as_json(metrics))
    return {**metrics, "cost": cost_of(examinee.effort)} if examinee.effort.seconds else metrics


def _with_skipped(suites: dict[str, Any], skipped: Mapping[str, list[str]]) -> dict[str, Any]:
    return {name: {**each, "skipped": skipped[name]} if name in skipped else each for name, each in suites.items()}


def _journals(out: Path | None) -> Path | None:
    """Return where answers are kept: in the workspace, or else beside the report; None without either."""
    from tasks.core.layout import JOURNALS, STATE

    try:
        return pipeline.find_workspace(Path.cwd()) / STATE / JOURNALS
    except BadParams:
        return out / STATE / JOURNALS if out else None


def _quantized_for(name: str) -> Any:
    """Return the adapter params that a base is loaded for in 4 or 8 bits; only their quantization counts."""
    from tasks.adapters.params import Int8Adapter, QloraAdapter

    common = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "targets": "all-linear"}
    if name == "nf4":
        form = {"quantization": "nf4", "double_quantization": True, "compute_dtype": "auto"}
        return QloraAdapter.model_validate({"name": "qlora", **common, **form})
    if name == "int8":
        return Int8Adapter.model_validate({"name": "lora8bit", **common, "outlier_threshold": 6.0})
    if name == "none":
        return None
    raise BadParams("is no form of a base", where="--quantization", got=name, expected="none, nf4 or int8")


# --- which suite ------------------------------------------------------------------------------------------------------


def resolve(wanted: Wanted) -> tuple[str, Suite | Ready]:
    """Return the suite that a name, a YAML file or a file of rows stands for.

    Raises:
        BadParams: there is no such suite, or the file is none.
        BadData: the columns of the rows do not show what the questions are.
    """
    from tasks.evaluate.suites import read_ready, shipped

    path = Path(wanted.suite)
    if not path.exists():
        return wanted.suite, shipped(wanted.suite)
    if path.suffix not in (".yaml", ".yml"):
        return path.stem, rows_suite(path, wanted)
    content = builtin_types(read_yaml(path))
    if "parts" in content:
        return path.stem, read_ready(path)
    asked = {"limit": wanted.limit or "none", "chat_template": wanted.chat}
    if "task" in content and "kind" not in content:
        metrics = content.get("metric_list") or [{}]
        first = metrics[0].get("metric", "") if isinstance(metrics, list) and isinstance(metrics[0], dict) else ""
        content = {"kind": "task_file", "path": str(path), "sha256": "none", "metric": str(first), "shots": "own"}
    try:
        suite: Suite = TypeAdapter(Suite).validate_python({**content, **asked})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors()]
        raise BadParams("is no suite", where=str(path), examples=wrong) from error
    return path.stem, suite


QUESTION = ("question", "query", "prompt", "instruction", "context", "input")
ANSWER = ("answer", "gold", "label", "target", "output", "response", "aliases", "continuation")
CHOICES = ("choices", "options", "endings")


def rows_suite(path: Path, wanted: Wanted) -> RowsSuite:
    """Build the suite of a file of rows from the names of its columns.

    Raises:
        BadData: they do not.
    """
    first = next(read_rows_of(path)).value
    columns = list(first) if isinstance(first, dict) else []
    question, answer, choices = (next((c for c in names if c in columns), "") for names in (QUESTION, ANSWER, CHOICES))
    lettered = [letter for letter in "ABCDEFGH" if letter in columns]
    stated: dict[str, Any] = {"question": question} if question else {}
    prompt, delimiter = "{{ question }}" if question else "", " " if question else ""
    metric: dict[str, Any]
    if {"chosen", "rejected"} <= set(columns):
        stated |= {"chosen": "chosen", "rejected": "rejected"}
        metric = {"name": "preference", "normalise": "none"}
    elif answer and (choices or len(lettered) > 1):
        stated |= {"choices": choices or lettered, "answer": answer}
        metric = {"name": "choice", "endings": "texts", "normalise": "characters"}
    elif question == "context" and answer == "continuation":
        stated |= {"answer": answer}
        metric = {"name": "loglikelihood", "score": "greedy"}
    elif question and answer:
        stated |= {"answer": answer}
        metric = {"name": "generate", "extract": "first_line", "target": "whole", "match": "normalised", "stop": []}
    elif "text" in columns:
        stated, prompt, metric = {"text": "text"}, "", {"name": "perplexity"}
    else:
        raise BadData(
            "the columns do not tell what is asked",
            where=str(path),
            got=", ".join(columns) or type(first).__name__,
            expected="a question and an answer, choices too, chosen and rejected, or text",
            fix="say it in a YAML file of `kind: rows`, as docs/params.md has it for evaluate.suites",
        )
    return RowsSuite.model_validate(
        {
            "kind": "rows",
            "path": str(path),
            "sha256": "none",
            "files": "*",
            "task": path.stem,
            "columns": stated,
            "prompt": prompt,
            "delimiter": delimiter,
            "metric": metric,
            "shots": "none",
            "max_new_tokens": MOST_ANSWER_TOKENS,
            "limit": wanted.limit or "none",
            "chat_template": wanted.chat,
        }
    )
