"""Trainings on the pretended device: every kind of adapter by every objective, on the pico model and a few rows."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tasks.adapters.attach import init_adapter
from tasks.core.progress import Progress
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.evaluate.continuation_scores import Continuation, score_continuations
from tasks.inference.continuations import continuations
from tasks.inference.params import Generation
from tasks.inference.rows import TokenRow
from tasks.models.device import seed_everything
from tasks.models.pretended_device import Crossing, Operation, PretendedDevice
from tasks.tokenization.chat_template import load_tokenizer
from tasks.train import trainer
from tasks.train.examples import Example
from tasks.train.params import Method
from tests.helpers.samples import (
    ADALORA,
    DPO,
    IA3,
    KTO,
    LEARNT_PROMPTS,
    LORA,
    LORA_8_BIT,
    LOREFT,
    ORPO,
    QLORA,
    SFT,
    SIMPO,
    method,
)
from tests.helpers.training import train

STEPS = 2
SAMPLED = Generation(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.3, repetition_range=8, seed=3)

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"name": "full", "modules": "all"},
    "lora": {**LORA, "dropout": 0.1},
    "lora of the last layer": {**LORA, "targets": r".*layers\.1\..*_proj"},
    "dora": {**LORA, "name": "dora"},
    "qlora": QLORA,
    "lora8bit": LORA_8_BIT,
    "adalora": {**ADALORA, "warmup_steps": 0, "final_steps": 0},
    "ia3": IA3,
    **LEARNT_PROMPTS,
    "loreft": LOREFT,
    "noreft": {**LOREFT, "name": "noreft", "positions": "f1+l1", "component": "mlp_output", "dropout": 0.1},
    "bottleneck": {"name": "bottleneck", "form": "parallel", "reduction_factor": 16.0},
    "oft": {"name": "peft", "method": "OFT", "config": {"target_modules": "all-linear", "oft_block_size": 8}},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {**SFT, "label_smoothing": 0.1},
    "orpo": {**ORPO, "likelihood": "prompt_and_reply"},
    "dpo": DPO,
    "simpo": SIMPO,
    "kto": KTO,
}


class Rehearsal(NamedTuple):
    """What a training did on the pretended device.

    Attributes:
        log: a row for each step.
        reads: what the host read in the course of the steps.
        uploads: what it moved there in their course, and waited for.
        training: the training.
        pretended: the device, with what was done before the first step, too.
    """

    log: list[dict[str, Any]]
    reads: list[Crossing]
    uploads: list[Crossing]
    training: trainer.Training
    pretended: PretendedDevice


def trained_by(adapter: str, objective: str, **changes: Any) -> Method:
    """A method of two steps in parts of two rows."""
    given = dict(OBJECTIVES[objective])
    if adapter == "full" and "reference" in given:
        given["reference"] = "precomputed"
    settings = {"batch_size": 4, "micro_batch_size": 2, **changes}
    return method(ADAPTERS[adapter], given, **settings)


def rows_for(objective: str) -> list[Example]:
    """Eight rows with prompts of several lengths, as an objective learns from them."""
    random = Random(3)

    def row(prompt: list[int], length: int, desirable: bool) -> TokenRow:
        reply = [random.randrange(5, 300) for _ in range(length)]
        return TokenRow(prompt + reply, [False] * len(prompt) + [True] * length, len(prompt), desirable)

    made: list[Example] = []
    for n in range(4 * STEPS):
        prompt = [random.randrange(5, 300) for _ in range(4 + 2 * (n % 5))]
        desirable, replies = objective != "kto" or n % 3 > 0, 1 if objective in ("sft", "kto") else 2
        made.append(tuple(row(prompt, 2 + (n + i) % 3, desirable) for i in range(replies)))
    return made


def on_host(base: Path, params: Method, folder: Path) -> list[dict[str, Any]]:
    """Trains on the host; returns the log."""
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter, STEPS * params.epochs)
    model.train()
    return train(model, rows_for(params.objective.name), params, folder, Progress("t", STEPS, "steps"))


def rehearsed(base: Path, params: Method, folder: Path) -> Rehearsal:
    """Trains on the pretended device: the model is loaded on the host, and moved there as it is."""
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter, STEPS * params.epochs)
    rows = rows_for(params.objective.name)
    with PretendedDevice() as pretended:
        pretended.take(model).train()
        reference = trainer.reference_for(model, rows, (), params, folder)
        micro_batch = AdaptiveMicroBatch(params.micro_batch_size, fit=False)
        training = trainer.plan_training(model, rows, params, micro_batch, reference)
        reads, uploads = len(pretended.reads), len(pretended.uploads)
        log = trainer.train(training, folder, Progress("t", STEPS, "steps"))
    return Rehearsal(log, pretended.reads[reads:], pretended.uploads[uploads:], training, pretended)


def own_operations(base: Path, folder: Path) -> set[str]:
    """The operations in 16 bits that our own code asks for: each adapter by one objective, evaluated, and generating.

    With TEMPER_COMPUTE_DTYPE=bfloat16 the base is in bf16.
    """
    found = set[Operation]()
    for number, adapter in enumerate(ADAPTERS):
        objective = [*OBJECTIVES][number % len(OBJECTIVES)]
        there = rehearsed(base, trained_by(adapter, objective), folder / adapter)
        found |= there.pretended.operations.keys()
        if adapter not in ("lora", "loreft", "prompt_tuning"):  # a way of its own through a model each
            continue
        tokenizer, model = load_tokenizer(base), there.training.model.eval()
        with there.pretended:
            score_continuations(model, [Continuation([5, 6, 7], [8, 9]), Continuation([5, 6], [8])])
            there.training.losses.held_out(rows_for(objective), 4)
            continuations(model, tokenizer, [[5, 6, 7], [8, 9]], 2, SAMPLED)
        found |= there.pretended.operations.keys()
    return {operation.name for operation in found if operation.own}
