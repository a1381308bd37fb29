"""Lets a model answer the held-out rows and scores it, against the base model too.

Reads:  data/models/METHOD/ (or data/base/ for the stage `baseline`), held-out chats of data/rendered/ (where there are
        none: chosen replies; of an encoder-decoder model: pairs), the base's answers.
Writes: data/reports/METHOD/examples.parquet (one row per example) and metrics.json.
Params: evaluate
Fails:  no held-out rows (65, never retried).

Exact match of chats runs through lm-eval; the loss per token is read off the model directly, because rows may
have several scored turns, which no task form of lm-eval has. Pairs are answered without lm-eval: its seq2seq backend
(0.4.13) gives a decoder as many tokens more as the longest input of the batch has, so that answers depend on their
batch, fills inputs up on the left, where encoders that count positions go wrong, and makes tokens of texts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from tasks import process
from tasks.adapted import load_packaged
from tasks.architecture import ENCODER_DECODER, architecture_in, positions_of
from tasks.device import settle
from tasks.errors import BadData
from tasks.evaluate_params import Evaluate
from tasks.harness import language_model
from tasks.intervals import bootstrap
from tasks.labels import label_metrics
from tasks.models import Model
from tasks.outputs import as_json, read_manifest, write_whole
from tasks.progress import Progress
from tasks.scoring import read_questions, row_of, score
from tasks.seq2seq import check_room, generate_targets
from tasks.tables import read_rows, write_rows
from tasks.templates import decode, load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

METRICS, EXAMPLES = "metrics.json", "examples.parquet"


class Answer(NamedTuple):
    """A model's answer to one row: `loss` is in nats per scored token, over `tokens` of them."""

    id: str
    family: str
    prompt: str
    target: str
    answer: str
    correct: bool
    loss: float
    tokens: int


def examples_schema() -> pa.Schema:
    """The columns of examples.parquet: the fields of `Answer`."""
    import pyarrow as pa

    types = {str: pa.string(), bool: pa.bool_(), float: pa.float64(), int: pa.int32()}
    return pa.schema([(name, types[hint]) for name, hint in get_type_hints(Answer).items()])


def last_turn(row: Mapping[str, Any]) -> int:
    """Where the last scored turn of a rendered chat begins: what stands before is the prompt that is answered."""
    mask: list[bool] = row["mask"]
    start = len(mask) - 1 - mask[::-1].index(True)
    while start > 0 and mask[start - 1]:
        start -= 1
    return start


def answer_rows(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Answer]:
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
    losses = token_losses(model, rows, params.batch_rows)
    return [
        Answer(row["id"], row["family"], text, target, answer, answer == target, loss, sum(row["mask"]))
        for row, text, target, answer, loss in zip(rows, texts, targets, answers, losses, strict=True)
    ]


def answer_pairs(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Answer]:
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
    for row, answer, loss in zip(rows, answers, token_losses(model, rows, params.batch_rows), strict=True):
        given, target = decode(tokenizer, row["input_ids"]), decode(tokenizer, row["target_ids"])
        made.append(
            Answer(row["id"], row["family"], given, target, answer, answer == target, loss, len(row["target_ids"]))
        )
    return made


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


def token_losses(model: Model, rows: Sequence[Mapping[str, Any]], batch_rows: int) -> list[float]:
    """The mean negative log-likelihood of each row's scored tokens, in nats."""
    import torch

    losses: list[float] = []
    with torch.no_grad(), Progress("score", len(rows), "rows") as progress:
        for start in range(0, len(rows), batch_rows):
            batch = [row_of(row) for row in rows[start : start + batch_rows]]
            losses += (-score(model, batch).row_means()).tolist()
            progress.step(by=len(batch))
    return losses


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics_of(
    model: str, answers: Sequence[Answer], base: Sequence[Answer] | None, params: Evaluate
) -> dict[str, Any]:
    """What is reported of a model; `base` are the base model's answers to the same rows, for the paired gain."""
    families = sorted({a.family for a in answers})
    by_family = {f: [a for a in answers if a.family == f] for f in families}
    metrics: dict[str, Any] = {
        "model": model,
        "rows": len(answers),
        "exact_match": bootstrap([a.correct for a in answers], params)._asdict(),
        "loss": mean_loss(answers),
        "families": {
            f: {"rows": len(rows), "exact_match": sum(a.correct for a in rows) / len(rows)}
            for f, rows in by_family.items()
        },
    }
    if labels := label_metrics([a.target for a in answers], [a.answer for a in answers], params):
        metrics["labels"] = labels
    if base is not None:
        before = {a.id: a.correct for a in base}
        gains = [float(a.correct) - float(before[a.id]) for a in answers]
        metrics["gain_over_base"] = bootstrap(gains, params)._asdict()
        metrics["base"] = {"exact_match": sum(before.values()) / len(before), "loss": mean_loss(base)}
    return metrics


def mean_loss(answers: Sequence[Answer]) -> float:
    """The loss per scored token over all answers, in nats."""
    return sum(a.loss * a.tokens for a in answers) / sum(a.tokens for a in answers)


def evaluate_model(
    model_folder: Path, rendered: Path, out: Path, name: str, base: Path | None, params: Evaluate
) -> None:
    """Evaluates a model folder and writes its report."""
    read_manifest(model_folder)
    read_manifest(rendered)
    architecture = architecture_in(model_folder)
    rows = read_questions(rendered, architecture)[: params.rows]
    settle(params.seed)
    answering = answer_pairs if architecture is ENCODER_DECODER else answer_rows
    answers = answering(load_packaged(model_folder), load_tokenizer(model_folder), rows, params)
    before = [Answer(**row) for row in read_rows(base)] if base else None
    metrics = metrics_of(name, answers, before, params)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / EXAMPLES, [answer._asdict() for answer in answers], examples_schema())
    write_whole(out / METRICS, as_json(metrics))
    exact, labels = metrics["exact_match"], metrics.get("labels")
    print(
        f"evaluate {name}: exact match {exact['mean']:.3f} [{exact['low']:.3f}, {exact['high']:.3f}], "
        f"loss {metrics['loss']:.3f}" + (f", macro-F1 {labels['macro_f1']['mean']:.3f}" if labels else ""),
        flush=True,
    )


def main() -> None:
    """The stage `evaluate@METHOD`."""
    with process.stage(__doc__, "model", "rendered", "base", "out", item="method") as stage:
        evaluate_model(
            stage.path("model"),
            stage.path("rendered"),
            stage.path("out"),
            stage.item,
            stage.path("base"),
            stage.params.evaluate,
        )


if __name__ == "__main__":
    main()
