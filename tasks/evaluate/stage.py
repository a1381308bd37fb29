"""Let a model answer the held-out rows and score it, against the base model too.

Reads:  data/models/METHOD/ (or data/base/ for the stage `baseline`), held-out chats of data/rendered/ (where there are
        none: chosen replies; of an encoder-decoder model: pairs), the base's report, and what suites of params name.
Writes: data/reports/METHOD/examples.parquet (one row per item of every suite) and metrics.json.
Params: evaluate
Fails:  no held-out rows, another chat template, a suite that cannot be asked, scores that are not finite (65, never
        retried); a dataset that the hub does not give now (75).

Exact match of chats runs through lm-eval; the loss per token is read off the model directly, because rows may
have several scored turns, which no task form of lm-eval has. Pairs are answered without lm-eval: its seq2seq backend
(0.4.13) gives a decoder as many tokens more as the longest input of the batch has, so that answers depend on their
batch, fills inputs up on the left, where encoders that count positions go wrong, and makes tokens of texts anew.
"""

from __future__ import annotations

from pathlib import Path

from tasks.core.artifacts import as_json, atomic_write, read_manifest
from tasks.core.layout import EXAMPLES, JOURNALS, METRICS, STATE, cost_file
from tasks.core.stage import run_stage
from tasks.evaluate.answer_metrics import answer_statistics
from tasks.evaluate.forgetting import general_loss
from tasks.evaluate.held_out import held_out_items
from tasks.evaluate.metrics import cost_of, describe_metrics, forgetting, metrics_of, written_by
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.params import Evaluate
from tasks.evaluate.suites import run_suites
from tasks.reports.items import check_scores, read_items, write_items
from tasks.tokenization.chat_template import template_digest


def evaluate_model(
    model_folder: Path, rendered: Path, out: Path, name: str, base: Path | None, params: Evaluate, state: Path | None
) -> None:
    """Evaluate a model folder and write its report.

    Args:
        model_folder: the model.
        rendered: with the held-out rows.
        out: the report's folder.
        name: of the method, or `base`.
        base: the base model's items, for the gain.
        params: the settings of the evaluation.
        state: a workspace's own folder, which keeps the journal, and what the evaluation cost; None to keep neither.

    Raises:
        BadInput: as `held_out_items`, `run_suites` and `general_loss` say; then nothing is written.
    """
    read_manifest(model_folder)
    examinee = ModelUnderTest(model_folder, params, state / JOURNALS if state else None, chats=True)
    answers = held_out_items(examinee, rendered)
    check_scores(answers)
    asked = run_suites(examinee, params.suites)
    metrics = metrics_of(name, [*answers, *asked.items], read_items(base) if base else None, params, asked.summaries)
    metrics["template_sha256"] = template_digest(examinee.tokenizer)
    metrics["answers"] = answer_statistics(*written_by(examinee, answers))
    for suite, skipped in asked.skipped.items():
        metrics["suites"][suite]["skipped"] = skipped
    if params.general_text != "none":
        metrics["forgetting"] = forgetting(general_loss(examinee, params.general_text), base)
    out.mkdir(parents=True, exist_ok=True)
    write_items(out / EXAMPLES, [*answers, *asked.items])
    atomic_write(out / METRICS, as_json(metrics))
    if state and examinee.effort.seconds:  # else all was known, and what it once cost stays written
        atomic_write(cost_file(state, name), as_json(cost_of(examinee.effort)))
    print(f"evaluate {name}: {describe_metrics(metrics)}", flush=True)


def main() -> None:
    """Run the stage `evaluate@METHOD`."""
    with run_stage(__doc__, "model", "rendered", "base", "out", item="method", may_fetch=True) as stage:
        evaluate_model(
            stage.path("model"),
            stage.path("rendered"),
            stage.path("out"),
            stage.item,
            stage.path("base"),
            stage.section("evaluate", Evaluate),
            stage.workspace / STATE,
        )
