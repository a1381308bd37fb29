from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, T5Config

from tasks.core.errors import BadModel
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rows import TokenRow
from tasks.train.estimate.estimate import (
    Machine,
    Suggestion,
    cut,
    estimate,
    full_rows,
    largest,
    longest_of,
    rates,
    suggest,
    this_machine,
)
from tasks.train.examples import Example
from tasks.train.params import Method
from tests.helpers.samples import ADALORA, LEARNT_PROMPTS, LORA, LORA_8_BIT, LOREFT, ORPO, QLORA, SFT, method

CPU = torch.device("cpu")
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)


def total(params: Method, max_tokens: int | None = None) -> int:
    examples = full_rows(params, max_tokens or 64)
    return estimate(CONFIG, params, examples, torch.float32, CPU).memory.total


def test_rows_that_are_not_rendered_yet_are_taken_at_their_longest() -> None:
    for objective, replies in ((SFT, 1), (ORPO, 2)):
        examples = full_rows(method(QLORA, objective, batch_size=3), 7)
        assert len(examples) == 3
        for example in examples:
            assert len(example) == replies
            assert {(row.tokens, row.scored_tokens) for row in example} == {(7, 6)}


def test_the_largest_step_of_an_epoch_counts_and_time_is_of_the_mean_one() -> None:
    def row(tokens: int) -> Example:
        return (TokenRow([1] * tokens, [False] + [True] * (tokens - 1), 1),)

    params = method(LORA, SFT, batch_size=2, epochs=3)
    long, short = [row(40)] * 2, [row(10)] * 6
    mixed = estimate(CONFIG, params, long + short, torch.float32, CPU)
    alone = estimate(CONFIG, params, long, torch.float32, CPU)
    assert mixed.memory == alone.memory
    assert (mixed.steps, alone.steps) == (12, 3)
    assert mixed.step.flops == pytest.approx(alone.step.flops * (40 + 10 + 10 + 10) / 4 / 40)


def test_trained_tokens_can_make_a_step_the_largest() -> None:
    """Logits are made of trained tokens alone: with many words, a shorter batch that learns everything needs more."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50_000
    )
    prompts = (TokenRow([1] * 60, [False] * 58 + [True] * 2, 58),)
    replies = (TokenRow([1] * 50, [False] + [True] * 49, 1),)
    params = method(LORA, SFT, batch_size=1)
    both, one = (estimate(config, params, each, torch.float32, CPU) for each in ([prompts, replies], [replies]))
    assert both.memory == one.memory


def test_what_reft_keeps_from_epoch_to_epoch_counts() -> None:
    rows = full_rows(method(LOREFT, SFT, batch_size=40), 32)
    once, twice = (
        estimate(CONFIG, method(LOREFT, SFT, batch_size=4, epochs=epochs), rows, torch.float32, CPU).memory
        for epochs in (1, 2)
    )
    kept = 40 * 32 * 64 * 4  # a hidden state of 64 floats for every token
    assert twice.total > kept
    assert twice.total - once.total == pytest.approx(kept, rel=0.6)


@pytest.mark.parametrize("adapter", [*LEARNT_PROMPTS.values(), LORA_8_BIT], ids=[*LEARNT_PROMPTS, "lora8bit"])
def test_soft_prompts_and_8_bit_bases_are_rehearsed_on_both_kinds_of_model(adapter: dict[str, Any]) -> None:
    t5 = T5Config(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=1000)
    t5.decoder_start_token_id = 0
    params = method(adapter, SFT)
    for config in (CONFIG, t5):
        pairs = config.is_encoder_decoder
        short, long = (
            estimate(config, params, full_rows(params, n, pairs=pairs), torch.float32, CPU).memory for n in (8, 64)
        )
        assert 0 < short.optimizer == long.optimizer
        assert short.weights == long.weights
        assert short.activations < long.activations


def test_adalora_is_planned_long_enough_where_rows_are_unknown_alone() -> None:
    params = method({**ADALORA, "warmup_steps": 10, "final_steps": 10}, SFT, epochs=2)
    rows = full_rows(params, 8)
    found = estimate(CONFIG, params, rows, torch.float32, CPU, all_rows=False)
    known = estimate(CONFIG, params, rows * 11, torch.float32, CPU)
    assert found.memory == known.memory
    assert found.parameters == known.parameters
    with pytest.raises(BadModel, match=r"leaves AdaLoRA no step .*\n.*10 \+ 10 of 2 steps"):
        estimate(CONFIG, params, rows, torch.float32, CPU)


def test_cut_rows_are_shorter_and_stay_rows() -> None:
    ((row,),) = cut([(TokenRow([1, 2, 3, 4], [False, False, True, True], 2),)], 3)
    assert row == TokenRow([1, 2, 3], [False, False, True], 2)


def test_an_encoder_decoder_reads_and_writes() -> None:
    """Twice the layers of a decoder; and rows of a pair are cut on both sides."""
    config = T5Config(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=100)
    config.decoder_start_token_id = 0
    params = method({**LORA, "targets": ["q", "v"]}, SFT)
    long, short = (estimate(config, params, full_rows(params, n, pairs=True), torch.float32, CPU) for n in (64, 16))
    assert long.memory.activations > 3 * short.memory.activations
    # q and v of two encoder layers and, twice, of two decoder layers: A and B of 2 x 64 numbers each
    assert short.parameters.trained == (4 + 8) * (2 * 64 + 2 * 64)
    assert longest_of(cut([(PairRow([1, 2, 3], [4, 5]),)], 2)) == 2


def test_fewer_rows_at_once_take_less_and_states_in_8_bits_do_too() -> None:
    params = method({"name": "full", "modules": "all"}, SFT, batch_size=8, micro_batch_size=8)
    whole = estimate(CONFIG, params, full_rows(params, 64), torch.bfloat16, CPU).memory
    parts = estimate(
        CONFIG, params.model_copy(update={"micro_batch_size": 1}), full_rows(params, 64), torch.bfloat16, CPU
    ).memory
    assert parts.activations + parts.logits < (whole.activations + whole.logits) / 4
    assert (parts.weights, parts.gradients, parts.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
    assert whole.optimizer == pytest.approx(2 * whole.weights, rel=0.01)  # in float32, all of them
    lighter = estimate(
        CONFIG, params.model_copy(update={"optimizer": "adamw_8bit"}), full_rows(params, 64), torch.bfloat16, CPU
    ).memory
    assert lighter.optimizer == pytest.approx(whole.optimizer / 4 * (1 + 4 / 256), rel=0.02)


@pytest.mark.parametrize(
    ("needed", "room", "expected"),
    [
        (lambda n: 10 + 3 * n, 40, (10, 40)),
        (lambda n: 10 + 3 * n, 39, (9, 37)),
        (lambda n: 10 + 3 * n, 13, (1, 13)),
        (lambda n: 10 + 3 * n, 12, None),
    ],
)
def test_the_largest_number_that_fits(needed: Any, room: int, expected: Any) -> None:
    assert largest(needed, 20, needed(20), room) == expected


def test_where_need_grows_ever_faster_what_is_found_fits_all_the_same() -> None:
    found = largest(lambda n: n * n, 100, 10_000, 2500)
    assert found is not None
    assert found[1] == found[0] ** 2 <= 2500


def by_change(params: Method, machine: Machine) -> dict[str, Suggestion]:
    found = suggest(lambda changed, tokens: total(changed, tokens), "mine", params, 64, machine)
    return {each.change.split("=")[0].split(":")[0]: each for each in found}


def test_suggestions_were_estimated_and_fit() -> None:
    params = method(LORA, SFT, batch_size=8, micro_batch_size=8)
    needed = total(params)
    machine = Machine("cpu", needed // 2 + 1000, 1000)
    found = by_change(params, machine)
    assert next(iter(found)) == "train.mine.micro_batch_size"
    assert list(found)[-1].startswith("a machine with")
    for change, each in list(found.items())[:-1]:
        assert each.total_bytes <= machine.room_bytes, change
    rows = int(found["train.mine.micro_batch_size"].change.split("=")[1])
    assert (
        total(params.model_copy(update={"micro_batch_size": rows})) == found["train.mine.micro_batch_size"].total_bytes
    )
    assert total(params.model_copy(update={"micro_batch_size": rows + 1})) > machine.room_bytes
    tokens = int(found["render.max_tokens"].change.split("=")[1])
    assert total(params, tokens) == found["render.max_tokens"].total_bytes


def test_where_weights_alone_are_too_much_only_fewer_bits_or_a_larger_machine_help() -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, vocab_size=256
    )

    def need(params: Method, tokens: int | None) -> int:
        return estimate(config, params, full_rows(params, tokens or 16), torch.float32, CPU).memory.total

    params = method(LORA, SFT, batch_size=2)
    machine = Machine("cpu", need(params, None) // 2, 0)
    changes = [each.change for each in suggest(need, "mine", params, 16, machine)]
    assert changes == ["train.mine.adapter: qlora of rank 2", "a machine with 8 GiB of memory free"]


def test_rates_and_memory_of_this_machine_are_of_the_right_size() -> None:
    found, machine = rates(torch.float32, CPU), this_machine(CPU)
    assert 1e8 < found.flops_per_s < 1e14
    assert 1e7 < found.bytes_per_s < 1e13
    assert 2**26 < machine.process_bytes < 2**34
    assert machine.room_bytes == machine.free_bytes - machine.process_bytes
