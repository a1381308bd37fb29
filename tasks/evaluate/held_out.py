"""The held-out rows as questions: a model's answers to them, and its loss on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.artifacts import read_manifest
from tasks.core.errors import BadData, BadModel
from tasks.core.progress import Progress
from tasks.evaluate.answer_cache import BATCHES
from tasks.evaluate.lm_eval_backend import language_model
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.params import Evaluate
from tasks.inference.encoder_decoder import check_room, generate_targets
from tasks.inference.logprobs import score_rows
from tasks.inference.rendered_rows import last_turn, read_questions, row_of
from tasks.models.device import host_read
from tasks.models.loader import Model
from tasks.reports.items import HELD_OUT, Item, prompt_digest
from tasks.tokenization.architecture import positions_of
from tasks.tokenization.chat_template import template_digest
from tasks.tokenization.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_rows(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Item]:
    """Answer rendered chats and score them.

    Raises:
        BadData: a prompt leaves the model no room to answer (lm-eval would cut its beginning off).
    """
    from tasks.adapters.prompt_tuning import virtual_tokens

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
    answers = generate_answers(model, tokenizer, dict(zip(texts, prompts, strict=True)), texts, params)
    logps = token_logps(model, rows, params.batch_size)
    return [
        _item(row, text, target, answer, logp, sum(row["mask"][1:]))
        for row, text, target, answer, logp in zip(rows, texts, targets, answers, logps, strict=True)
    ]


def answer_pairs(
    model: Model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], params: Evaluate
) -> list[Item]:
    """Answer the inputs of rendered pairs and score their targets.

    Raises:
        BadData: an input, or what may be answered, is too long for the model.
    """
    check_room(model, [(row["id"], row["input_ids"]) for row in rows], params.max_new_tokens)
    answers: list[str] = []
    with Progress("answer", len(rows), "rows") as progress:
        for start in range(0, len(rows), params.batch_size):
            inputs = [row["input_ids"] for row in rows[start : start + params.batch_size]]
            answered = generate_targets(model, tokenizer, inputs, params.max_new_tokens, params.generation)
            answers += [decode(tokenizer, ids) for ids in answered]
            progress.step(by=len(inputs))
    made = []
    for row, answer, logp in zip(rows, answers, token_logps(model, rows, params.batch_size), strict=True):
        given, target = decode(tokenizer, row["input_ids"]), decode(tokenizer, row["target_ids"])
        made.append(_item(row, given, target, answer, logp, len(row["target_ids"])))
    return made


def _item(row: Mapping[str, Any], prompt: str, target: str, answer: str, logp: float, tokens: int) -> Item:
    score = float(answer == target)
    return Item(HELD_OUT, row["family"], row["id"], prompt, prompt_digest(prompt), target, answer, score, logp, tokens)


def generate_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    params: Evaluate,
) -> list[str]:
    """Generate continuations of rendered prompts, through lm-eval, without white space around them.

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
                batch_size=params.batch_size,
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


def token_logps(model: Model, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
    """Compute the log-probability of each row's scored tokens together, in nats."""
    import torch

    logps: list[float] = []
    with torch.no_grad(), Progress("score", len(rows), "rows") as progress:
        for start in range(0, len(rows), batch_size):
            batch = [row_of(row) for row in rows[start : start + batch_size]]
            sums = score_rows(model, batch).row_sums()
            with host_read("the log-probabilities of a batch"):
                logps += sums.tolist()
            progress.step(by=len(batch))
    return logps


def held_out_items(examinee: ModelUnderTest, rendered: Path) -> list[Item]:
    """Answer and score the held-out rows; answers that the journal has are not computed again.

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
    for start in range(0, len(rows), BATCHES * params.batch_size):
        some = list(rows[start : start + BATCHES * params.batch_size])
        asked = [HELD_OUT, params.max_new_tokens, some]
        items += [Item(**each) for each in examinee.recall(asked, partial(answered, some), tokens)]
    return items
