from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tasks.adapters.attach import init_adapter, published_state
from tasks.core.errors import BadData, BadParams
from tasks.core.parquet import write_rows
from tasks.core.progress import Progress
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.inference.rows import TokenRow
from tasks.ingest.stage import Reading
from tasks.models.device import seed_everything
from tasks.registry.client import flat
from tasks.render.stage import render_rows, rendered_schema
from tasks.tokenization.architecture import DECODER, ENCODER_DECODER
from tasks.train.batching import batches_of, kind_of_rows, read_examples, steps_per_epoch
from tasks.train.examples import Example
from tasks.train.params import Method
from tasks.train.trainer import plan_training, reference_for
from tests.helpers.samples import (
    ADALORA,
    DPO,
    IA3,
    KTO,
    LORA,
    LOREFT,
    ORPO,
    QLORA,
    RENDER,
    SFT,
    SIMPO,
    file_source,
    method,
)
from tests.helpers.training import held_out_loss, loss_of, losses_of, train

METHODS = {
    "qlora": method(QLORA, SFT),
    "orpo": method(QLORA, ORPO),
    "reft": method(LOREFT, SFT),
    "in small parts": method(QLORA, ORPO, micro_batch_size=1, optimizer="paged_adamw_8bit"),
    "full": method({"name": "full", "modules": "all"}, SFT),
    "lora8bit": method({**LORA, "name": "lora8bit", "outlier_threshold": 6.0}, SFT),
    "adalora": method({**ADALORA, "final_steps": 0}, SFT, learning_rate=0.05),
    "ia3": method(IA3, SFT, learning_rate=0.1),
    "prompt_tuning": method({"name": "prompt_tuning", "tokens": 4, "start": "vocabulary", "text": ""}, SFT),
    "p_tuning": method(
        {"name": "p_tuning", "tokens": 4, "encoder": "lstm", "hidden_size": 8, "dropout": 0.1}, SFT, learning_rate=0.1
    ),
    "prefix": method({"name": "prefix", "tokens": 4, "hidden_size": 8}, SFT),
    "orpo by p_tuning_v2": method({"name": "p_tuning_v2", "tokens": 4}, ORPO, learning_rate=0.1),
}
METHODS |= {
    "smoothed and noisy": method(LORA, {**SFT, "label_smoothing": 0.1, "neftune_alpha": 5.0}, micro_batch_size=2),
    "noise before edits": method(LOREFT, {**SFT, "neftune_alpha": 5.0}),
    "orpo with prompts": method(LOREFT, {**ORPO, "likelihood": "prompt_and_reply"}, learning_rate=0.02),
    "dpo": method(QLORA, {**DPO, "beta": 0.5}),
    "dpo by reft": method(LOREFT, {**DPO, "beta": 0.5}, learning_rate=0.05),
    "dpo by prompts": method(
        {"name": "prompt_tuning", "tokens": 4, "start": "vocabulary", "text": ""}, {**DPO, "beta": 0.5}
    ),
    "ipo by all weights": method(
        {"name": "full", "modules": "all"}, {**DPO, "loss": "ipo", "beta": 0.5, "reference": "precomputed"}
    ),
    "hinge": method({**LORA, "dropout": 0.1}, {**DPO, "loss": "hinge", "reference": "precomputed"}),
    "simpo": method(ADALORA | {"final_steps": 0}, SIMPO, learning_rate=0.05, micro_batch_size=2),
    "kto": method(QLORA, KTO | {"beta": 0.5}, micro_batch_size=2, learning_rate=0.05),
    "kto by reft": method(LOREFT, KTO | {"beta": 0.5}, learning_rate=0.05),
    "kto by ia3": method(IA3, KTO | {"beta": 0.5}, learning_rate=0.1),
    "kto by all weights": method({"name": "full", "modules": "all"}, {**KTO, "reference": "precomputed", "beta": 0.5}),
    "kto by prefix": method({"name": "prefix", "tokens": 4, "hidden_size": 8}, KTO | {"beta": 0.5}, learning_rate=0.05),
}
PREFERENCES = {name for name, params in METHODS.items() if params.objective.name in ("orpo", "dpo", "simpo")}


def examples(name: str, count: int = 10) -> list[Example]:
    torch.manual_seed(1)
    labelled = "kto" in name

    def row(prompt: list[int], length: int, desirable: bool) -> TokenRow:
        reply = torch.randint(5, 300, (length,)).tolist()
        return TokenRow(prompt + reply, [False] * len(prompt) + [True] * length, len(prompt), desirable)

    made: list[Example] = []
    for n in range(count):
        prompt = torch.randint(5, 300, (3 + n % 4,)).tolist()
        desirable = not labelled or n % 3 > 0
        made.append(tuple(row(prompt, 2 + (n + i) % 3, desirable) for i in range(2 if name in PREFERENCES else 1)))
    return made


def trained(
    base: Path, name: str, folder: Path, params: Method | None = None, die_after: int = 0
) -> dict[str, torch.Tensor]:
    params = params or METHODS[name]
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter, params.epochs * 3)

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == die_after:
            raise KeyboardInterrupt

    model.train()
    train(model, examples(name), params, folder, Progress("t", 1, "steps"), on_row)
    return {key: tensor.detach().clone() for key, tensor in published_state(model).items()}


REWARDS = {"nll", "reward_chosen", "reward_rejected", "margin", "accuracy"}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_adapter_and_so_does_a_resumed_training(
    pico_base: Path, tmp_path: Path, name: str
) -> None:
    whole = trained(pico_base, name, tmp_path / "one")
    again = trained(pico_base, name, tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        trained(pico_base, name, tmp_path / "three", die_after=3)
    resumed = trained(pico_base, name, tmp_path / "three")
    for other in (again, resumed):
        assert whole.keys() == other.keys()
        assert all(torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_on_what_it_sees(pico_base: Path, tmp_path: Path, name: str) -> None:
    params = METHODS[name].model_copy(update={"epochs": 8})
    seed_everything(1)
    model = init_adapter(pico_base, params.adapter, 8 * 3)
    rows = examples(name)
    reference = reference_for(model, rows, rows, params, tmp_path)
    before = held_out_loss(model, rows, params, reference)
    train(model, rows, params, tmp_path, Progress("t", 1, "steps"), reference=reference)
    assert held_out_loss(model, rows, params, reference) < before - 0.05


def test_weight_decay_leaves_the_rows_of_r_orthonormal(pico_base: Path, tmp_path: Path) -> None:
    params = method(LOREFT, SFT, weight_decay=0.5, epochs=3)
    state = trained(pico_base, "reft", tmp_path, params)
    for name, rotation in state.items():
        if "rotation" in name:
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_rows_in_a_batch_and_their_padding_do_not_matter(
    pico_base: Path, tmp_path: Path, name: str
) -> None:
    seed_everything(1)
    model = init_adapter(pico_base, METHODS[name].adapter, 3).float().eval()
    rows = examples(name, 6)
    reference = reference_for(model, rows, (), METHODS[name].model_copy(update={"batch_size": 6}), tmp_path)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.02 * torch.randn_like(parameter)
    loss, logged = loss_of(model, rows, METHODS[name], reference)
    reversed_loss, reversed_logged = loss_of(model, rows[::-1], METHODS[name], reference)
    assert reversed_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert reversed_logged == pytest.approx(logged, rel=1e-3, abs=1e-5)
    assert all(math.isfinite(value) for value in logged.values())
    if name in PREFERENCES:
        of_orpo = {"odds_penalty"} if METHODS[name].objective.name == "orpo" else set()
        assert set(logged) == {*REWARDS, "log_odds_ratio", *of_orpo}
    elif "kto" in name:
        assert set(logged) == {*REWARDS, "baseline"}
    else:
        singles = [loss_of(model, [row], METHODS[name])[0].item() for row in rows]
        tokens = [sum(chat.mask) for row in rows for chat in row if isinstance(chat, TokenRow)]
        weighted = sum(s * t for s, t in zip(singles, tokens, strict=True)) / sum(tokens)
        assert loss.item() == pytest.approx(weighted, rel=1e-4)


EXACT = {**QLORA, "compute_dtype": "float32"}
ADDED = {
    "qlora": method(EXACT, SFT),
    "orpo": method(EXACT, ORPO),
    "reft": METHODS["reft"],
    "adalora": METHODS["adalora"],
    "smoothed and noisy": METHODS["smoothed and noisy"],
    "orpo with prompts": METHODS["orpo with prompts"],
    "dpo": method(EXACT, DPO),
    "simpo": method(LORA, SIMPO),
    "kto": method(LORA, {**KTO, "desirable_weight": 1.5}),
    "kto by prefix": METHODS["kto by prefix"],
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_gradients_added_up_are_those_of_the_whole_batch(pico_base: Path, name: str, rows_at_once: int) -> None:
    """Rows with replies of different lengths: a token weighs the same whichever part it is in."""
    found = []
    for at_once in (8, rows_at_once):
        params = ADDED[name].model_copy(update={"micro_batch_size": at_once})
        seed_everything(1)
        model = init_adapter(pico_base, params.adapter, 3).float().train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.05 * torch.randn_like(parameter)
        total, logged = 0.0, Counter[str]()
        for loss, extra in losses_of(model, examples(name, 8), params):
            loss.backward()
            total += loss.item()
            for key, value in extra.items():
                logged[key] += value  # type: ignore[assignment]
        found.append((total, dict(logged), [p.grad for p in parameters]))
    (whole, whole_logged, whole_gradients), (parts, parts_logged, gradients) = found
    assert parts == pytest.approx(whole, rel=1e-5)
    assert parts_logged == pytest.approx(whole_logged, rel=1e-4, abs=1e-6)
    for one, other in zip(whole_gradients, gradients, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() < 1e-4 * one.norm()


def test_every_epoch_sees_every_row_once() -> None:
    lengths = [(n * 7) % 13 for n in range(50)]
    steps = steps_per_epoch(50, 8)
    assert steps == 7
    for epoch in range(3):
        batches = batches_of(epoch, lengths, 8, seed=3)
        assert len(batches) == steps
        assert Counter(i for batch in batches for i in batch) == Counter(range(50))
    first, second = (batches_of(epoch, lengths, 8, seed=3)[0] for epoch in (0, 1))
    assert first != second
    assert first == batches_of(0, lengths, 8, seed=3)[0]
    assert first != batches_of(0, lengths, 8, seed=4)[0]


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [int(n) for n in torch.randint(1, 200, (512,), generator=torch.Generator().manual_seed(0))]
    spread = [
        max(found) - min(found) for batch in batches_of(0, lengths, 8, 1) if (found := [lengths[i] for i in batch])
    ]
    assert sum(spread) / len(spread) < 30  # of 200; in random order it would be about 155


def write_rendered(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train" / f"{kind}.parquet", rows, rendered_schema(kind))


def test_rows_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    write_rendered(
        tmp_path, "chat", [{"id": "1", "family": "", "ids": [1, 2], "mask": [False, True], "prompt_tokens": 1}]
    )
    write_rendered(tmp_path, "preference", [])
    assert list(read_examples(tmp_path, "train", METHODS["qlora"].objective, DECODER)) == [
        (TokenRow([1, 2], [False, True], 1),)
    ]
    with pytest.raises(BadData, match="holds no preference rows, which the objective orpo learns from"):
        read_examples(tmp_path, "train", METHODS["orpo"].objective, DECODER)


def test_pairs_become_two_sequences_with_one_prompt(tmp_path: Path) -> None:
    row = {"id": "1", "family": "", "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    write_rendered(tmp_path, "preference", [row])
    assert list(read_examples(tmp_path, "train", METHODS["orpo"].objective, DECODER)) == [
        (TokenRow([1, 2, 3], [False, False, True], 2), TokenRow([1, 2, 4, 5], [False, False, True, True], 2))
    ]


def labelled(*labels: bool) -> list[dict[str, Any]]:
    return [
        {"id": str(n), "family": "", "prompt_ids": [1, 2], "reply_ids": [3], "label": x} for n, x in enumerate(labels)
    ]


def test_labelled_replies_keep_their_labels(tmp_path: Path) -> None:
    write_rendered(tmp_path, "labelled", labelled(True, False))
    assert list(read_examples(tmp_path, "train", METHODS["kto"].objective, DECODER)) == [
        (TokenRow([1, 2, 3], [False, False, True], 2, desirable),) for desirable in (True, False)
    ]


def test_kto_needs_labelled_replies_and_both_labels(tmp_path: Path) -> None:
    write_rendered(tmp_path, "labelled", [])
    with pytest.raises(BadData, match="holds no labelled rows, which the objective kto learns from"):
        read_examples(tmp_path, "train", METHODS["kto"].objective, DECODER)
    write_rendered(tmp_path, "labelled", labelled(False, False, False))
    with pytest.raises(BadData, match="one label only") as caught:
        read_examples(tmp_path, "train", METHODS["kto"].objective, DECODER)
    assert caught.value.got == "3 replies that are all bad"
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("objective", [DPO, SIMPO, KTO])
def test_preferences_are_not_for_encoder_decoders(tmp_path: Path, objective: dict[str, Any]) -> None:
    with pytest.raises(BadParams, match="preferences are for decoders only"):
        read_examples(tmp_path, "train", method(LORA, objective).objective, ENCODER_DECODER)


@pytest.mark.parametrize(
    ("file", "objective"),
    [
        ("kto_en_demo.json", KTO | {"beta": 1.0}),
        ("dpo_en_demo.json", DPO | {"beta": 1.0}),
        ("dpo_en_demo.json", SIMPO | {"beta": 10.0}),  # its rewards are per token
    ],
    ids=["kto", "dpo", "simpo"],
)
def test_real_preferences_are_trained(
    pico_base: Path,
    real_data: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    file: str,
    objective: dict[str, Any],
) -> None:
    """From the file to rewards that tell the replies apart which were trained from."""
    records = Reading("s", file_source(real_data / "llama_factory" / file, take={"first": 40})).records()
    rendered, _ = render_rows(records, tokenizer, RENDER.model_copy(update={"max_tokens": 4096, "too_long": "drop"}))
    params = method(LORA, objective, epochs=4, batch_size=8, learning_rate=0.02)
    kind = kind_of_rows(params.objective, DECODER)
    ids = ("prompt_ids", "reply_ids", "chosen_ids", "rejected_ids")
    rows = [{k: v[-24:] if k in ids else v for k, v in row.items()} for row in rendered["train", kind]]
    write_rendered(tmp_path, kind, rows)
    log = train(
        init_adapter(pico_base, params.adapter),
        read_examples(tmp_path, "train", params.objective, DECODER),
        params,
        tmp_path / "checkpoints",
        Progress("t", 1, "steps"),
    )
    first, last = log[0], log[-1]
    assert last["loss"] < first["loss"] - 0.05
    assert last["margin"] > first["margin"] + 0.1


def test_speed_and_memory_are_told_beside_the_log(pico_base: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    params, rows = METHODS["reft"], examples("reft")
    log = train(init_adapter(pico_base, params.adapter), rows, params, tmp_path, Progress("t", 1, "steps"), told.append)
    assert [row.keys() - kept.keys() for row, kept in zip(told, log, strict=True)] == [
        {"tokens_per_s", "memory_peak_mib"}
    ] * 3
    assert all(row["tokens_per_s"] > 0 and row["memory_peak_mib"] > 50 for row in told)


def test_params_are_logged_under_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_tokens_of_all_steps_by_hand(pico_base: Path) -> None:
    """Rows of 3, 5, 7 and 9 tokens in steps of two: 24 tokens in each of three epochs; a pair counts both replies."""

    def tokens(rows: list[Example], asked: Method) -> Sequence[int]:
        model, micro_batch = init_adapter(pico_base, asked.adapter), AdaptiveMicroBatch(1, fit=False)
        return plan_training(model, rows, asked, micro_batch, None).tokens

    rows: list[Example] = [(TokenRow([1] * count, [True] * count, 1),) for count in (3, 5, 7, 9)]
    found = tokens(rows, method(LORA, SFT, batch_size=2, epochs=3))
    assert [sum(found[:steps]) for steps in (0, 2, 4, 6)] == [0, 24, 48, 72]
    pair: Example = (TokenRow([1] * 4, [True] * 4, 1), TokenRow([1] * 6, [True] * 6, 1))
    assert tokens([pair], method(LORA, ORPO, batch_size=1, epochs=1)) == [10]
