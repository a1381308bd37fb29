"""Lets a model answer the held-out rows and scores it, against the base model too.

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

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tasks import process
from tasks.answers import answer_statistics
from tasks.architecture import positions_of
from tasks.device import device
from tasks.errors import BadData, BadModel
from tasks.evaluate_params import HELD_OUT, Evaluate
from tasks.examinee import Effort, Examinee
from tasks.forgetting import TextLoss, general_loss
from tasks.harness import language_model
from tasks.intervals import bootstrap
from tasks.items import (
    EXAMPLES,
    Item,
    Summary,
    check_finite,
    digest_of,
    mean_loss,
    read_items,
    suite_metrics,
    write_items,
)
from tasks.journal import BATCHES, JOURNALS, STATE, cost_file
from tasks.labels import label_metrics
from tasks.models import Model
from tasks.outputs import as_json, read_manifest, write_whole
from tasks.progress import Progress
from tasks.scoring import read_questions, row_of, score
from tasks.seq2seq import check_room, generate_targets
from tasks.suites import examine
from tasks.templates import decode, template_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRICS = "metrics.json"


def last_turn(row: Mapping[str, Any]) -> int:
    """Where the last scored turn of a rendered chat begins: what stands before is the prompt that is answered."""
    mask: list[bool] = row["mask"]
    start = len(mask) - 1 - mask[::-1].index(True)
    while start > 0 and mask[start - 1]:
        start -= 1
    return start


def answer_rows(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Item]:
    """Answers rendered chats and scores them.

    Raises:
        BadData: a prompt leaves the model no room to answer (lm-eval would cut its beginning off).
    """
    from tasks.adapters.virtual import virtual_tokens

    prompts = [row["ids"][: last_turn(row)] for row in rows]
    room = positions_of(model.config) - params.max_new_tokens - virtual_tokens(model)
    if cramped := [
        f"{row['id']}: {len(ids)} tokens" for row, ids in zip(rows, prompts, strict=True) if len(ids) > room
    ]:
        raise BadData(
            f"{len(cramped)} prompts leave no room for evaluate.max_new_tokens = {params.max_new_tokens}",
            examples=cramped,
            expected=f"prompts of at most {room} tokens",
            fix="lower render.max_tokens or evaluate.max_new_tokens",
        )
    targets = [decode(tokenizer, row["ids"][len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
    texts = [str(tokenizer.decode(ids)) for ids in prompts]
    answers = generate(model, tokenizer, dict(zip(texts, prompts, strict=True)), texts, params)
    logps = token_logps(model, rows, params.batch_rows)
    return [
        _item(row, text, target, answer, logp, sum(row["mask"][1:]))
        for row, text, target, answer, logp in zip(rows, texts, targets, answers, logps, strict=True)
    ]


def answer_pairs(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Item]:
    """Answers the inputs of rendered pairs and scores their targets.

    Raises:
        BadData: an input, or what may be answered, is too long for the model.
    """
    check_room(model, [(row["id"], row["input_ids"]) for row in rows], params.max_new_tokens)
    answers: list[str] = []
    with Progress("answer", len(rows), "rows") as progress:
        for start in range(0, len(rows), params.batch_rows):
            inputs = [row["input_ids"] for row in rows[start : start + params.batch_rows]]
            answered = generate_targets(model, tokenizer, inputs, params.max_new_tokens, params.generation)
            answers += [decode(tokenizer, ids) for ids in answered]
            progress.step(by=len(inputs))
    made = []
    for row, answer, logp in zip(rows, answers, token_logps(model, rows, params.batch_rows), strict=True):
        given, target = decode(tokenizer, row["input_ids"]), decode(tokenizer, row["target_ids"])
        made.append(_item(row, given, target, answer, logp, len(row["target_ids"])))
    return made


def _item(row: Mapping[str, Any], prompt: str, target: str, answer: str, logp: float, tokens: int) -> Item:
    score = float(answer == target)
    return Item(HELD_OUT, row["family"], row["id"], prompt, digest_of(prompt), target, answer, score, logp, tokens)


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    params: Evaluate,
) -> list[str]:
    """Continuations of rendered prompts, through lm-eval, without white space around them.

    Args:
        model: a decoder.
        tokenizer: its own.
        tokens: of each prompt those that training saw: made of its text anew they may be others, as where SentencePiece
            puts a space after a control token.
        prompts: texts.
        params: how long answers may get, and how tokens are chosen.
    """
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = {
        "task": "held_out",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict({"prompt": list(prompts)})},
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: "",
        "output_type": "generate_until",
        "generation_kwargs": {"until": [tokenizer.eos_token], "max_gen_toks": params.max_new_tokens},
        "metric_list": [{"metric": "bypass"}],
    }
    with Progress("answer", len(prompts), "rows") as progress:
        result = simple_evaluate(
            model=language_model(
                model,
                tokenizer,
                batch_rows=params.batch_rows,
                generation=params.generation,
                progress=progress,
                tokens=tokens,
            ),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    samples = sorted(result["samples"]["held_out"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0].strip() for sample in samples]


def token_logps(model: Model, rows: Sequence[Mapping[str, Any]], batch_rows: int) -> list[float]:
    """The log-probability of each row's scored tokens together, in nats."""
    import torch

    logps: list[float] = []
    with torch.no_grad(), Progress("score", len(rows), "rows") as progress:
        for start in range(0, len(rows), batch_rows):
            batch = [row_of(row) for row in rows[start : start + batch_rows]]
            logps += score(model, batch).row_sums().tolist()
            progress.step(by=len(batch))
    return logps


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics_of(
    model: str,
    items: Sequence[Item],
    base: Sequence[Item] | None,
    params: Evaluate,
    suite_summaries: Mapping[tuple[str, str], Summary] = MappingProxyType({}),
) -> dict[str, Any]:
    """What is reported of a model.

    Args:
        model: its name.
        items: of the held-out rows, and of further suites.
        base: the base model's of the same held-out rows, for the paired gain.
        params: of the intervals.
        suite_summaries: of the further suites' tasks.

    Raises:
        BadData: the base model was asked other questions.
    """
    summaries = {(HELD_OUT, item.task): Summary("exact_match", {}) for item in items if item.suite == HELD_OUT}
    suites = suite_metrics(items, {**summaries, **suite_summaries}, params)
    answers = [item for item in items if item.suite == HELD_OUT]
    metrics: dict[str, Any] = {
        "model": model,
        "rows": len(answers),
        "exact_match": suites[HELD_OUT]["score"],
        "loss": mean_loss(answers),
        "families": {
            family: {"rows": each["rows"], "exact_match": each["score"]["mean"]}
            for family, each in suites[HELD_OUT]["tasks"].items()
        },
        "suites": suites,
    }
    if labels := label_metrics([a.target for a in answers], [a.prediction for a in answers], params):
        metrics["labels"] = labels
    if base is not None:
        before = _paired(answers, base)
        gains = [item.score - old.score for item, old in zip(answers, before, strict=True)]
        metrics["gain_over_base"] = bootstrap(sorted(gains), params)._asdict()  # as the comparison page draws
        metrics["base"] = {
            "exact_match": sum(old.score for old in before) / len(before),
            "loss": mean_loss(before),
        }
    return metrics


def _paired(answers: Sequence[Item], base: Sequence[Item]) -> list[Item]:
    """The base model's items of the same questions, in the same order.

    Raises:
        BadData: the base was asked others.
    """
    known = {(item.id, *item.same): item for item in base}
    if others := [item.id for item in answers if (item.id, *item.same) not in known]:
        raise BadData(
            f"{len(others)} of {len(answers)} held-out rows are not those that the base model answered",
            examples=others,
            fix="run the stage `baseline` anew",
        )
    return [known[item.id, *item.same] for item in answers]


def held_out_items(examinee: Examinee, rendered: Path) -> list[Item]:
    """What a model makes of the held-out rows; what its journal has is not asked again.

    Raises:
        BadData: there are no such rows, or a prompt leaves no room to answer.
        BadModel: the chat template is not the one that the rows were rendered with.
    """
    params, tokenizer = examinee.params, examinee.tokenizer
    about = read_manifest(rendered)
    if not examinee.encodes and (wanted := about.get("template_sha256")) != template_digest(tokenizer):
        raise BadModel(
            "its chat template is not the one that the rows were rendered with",
            where=str(examinee.folder),
            got=template_digest(tokenizer)[:12],
            expected=str(wanted)[:12],
            fix="evaluate the model with the template that it was trained with",
        )
    answering = answer_pairs if examinee.encodes else answer_rows

    def answered(some: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [item._asdict() for item in answering(examinee.model, tokenizer, some, params)]

    def tokens(answers: Sequence[Mapping[str, Any]]) -> int:
        texts = [f"{answer['prompt']}{answer['prediction']}" for answer in answers]
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    rows = read_questions(rendered, examinee.architecture)[: params.rows]
    items: list[Item] = []
    for start in range(0, len(rows), BATCHES * params.batch_rows):
        some = rows[start : start + BATCHES * params.batch_rows]
        asked = [HELD_OUT, params.max_new_tokens, some]
        items += [Item(**each) for each in examinee.recall(asked, partial(answered, some), tokens)]
    return items


def evaluate_model(
    model_folder: Path, rendered: Path, out: Path, name: str, base: Path | None, params: Evaluate, state: Path | None
) -> None:
    """Evaluates a model folder and writes its report.

    Args:
        model_folder: the model.
        rendered: with the held-out rows.
        out: the report's folder.
        name: of the method, or `base`.
        base: the base model's items, for the gain.
        params: what is asked.
        state: a workspace's own folder, which keeps the journal, and what the evaluation cost; None to keep neither.

    Raises:
        BadInput: as `held_out_items`, `examine` and `general_loss` say; then nothing is written.
    """
    read_manifest(model_folder)
    examinee = Examinee(model_folder, params, state / JOURNALS if state else None, chats=True)
    answers = held_out_items(examinee, rendered)
    check_finite(answers)
    asked = examine(examinee, params.suites)
    metrics = metrics_of(name, [*answers, *asked.items], read_items(base) if base else None, params, asked.summaries)
    metrics["template_sha256"] = template_digest(examinee.tokenizer)
    metrics["answers"] = answer_statistics(*written_by(examinee, answers))
    for suite, skipped in asked.skipped.items():
        metrics["suites"][suite]["skipped"] = skipped
    if params.general_text != "none":
        metrics["forgetting"] = forgetting(general_loss(examinee, params.general_text), base)
    out.mkdir(parents=True, exist_ok=True)
    write_items(out / EXAMPLES, [*answers, *asked.items])
    write_whole(out / METRICS, as_json(metrics))
    if state and examinee.effort.seconds:  # else all was known, and what it once cost stays written
        write_whole(cost_file(state, name), as_json(cost_of(examinee.effort)))
    print(f"evaluate {name}: {_said(metrics)}", flush=True)


def written_by(examinee: Examinee, answers: Sequence[Item]) -> tuple[list[str], list[int]]:
    """The texts of answers, and how many tokens each has."""
    texts = [item.prediction for item in answers]
    return texts, [len(ids) for ids in examinee.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def cost_of(effort: Effort) -> dict[str, Any]:
    """What an evaluation cost, which depends on the machine and so is no part of its report."""
    speed = effort.tokens / effort.seconds
    return {**effort._asdict(), "tokens_per_s": speed, "device": str(device())}


def forgetting(own: TextLoss, base: Path | None) -> dict[str, Any]:
    """The loss on the general text beside the base model's, whose report stands beside its items.

    Raises:
        BadData: the base's report lacks it, or is of another text.
    """
    if base is None:
        return {**own._asdict(), "base_loss": own.loss}
    before = json.loads((base.parent / METRICS).read_text()).get("forgetting", {})
    if before.get("tokens") != own.tokens or not math.isfinite(before.get("loss", math.nan)):
        raise BadData(
            "the base model has no loss on this general text",
            where=str(base.parent / METRICS),
            got=f"{before.get('tokens')} tokens",
            expected=f"{own.tokens} tokens",
            fix="run the stage `baseline` anew",
        )
    return {**own._asdict(), "base_loss": before["loss"]}


def _said(metrics: Mapping[str, Any]) -> str:
    exact, labels = metrics["exact_match"], metrics.get("labels")
    said = f"exact match {exact['mean']:.3f} [{exact['low']:.3f}, {exact['high']:.3f}], loss {metrics['loss']:.3f}"
    if labels:
        said += f", macro-F1 {labels['macro_f1']['mean']:.3f}"
    for suite, each in metrics["suites"].items():
        if suite != HELD_OUT:
            score = each["score"]
            said += f"; {suite} {each['metric']} {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
    return said


def main() -> None:
    """The stage `evaluate@METHOD`."""
    with process.stage(__doc__, "model", "rendered", "base", "out", item="method", may_fetch=True) as stage:
        evaluate_model(
            stage.path("model"),
            stage.path("rendered"),
            stage.path("out"),
            stage.item,
            stage.path("base"),
            stage.params.evaluate,
            stage.workspace / STATE,
        )


if __name__ == "__main__":
    main()
