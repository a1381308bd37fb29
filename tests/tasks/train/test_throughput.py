"""What a step must compute, against PyTorch's own count and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from bench.operations import Needed, matrices, operations_of
from tasks.adapters.attach import make_trainable
from tasks.inference.rows import TokenRow
from tests.helpers.samples import LORA, SFT, method
from tests.helpers.training import loss_of

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=12,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=200,
)


def test_a_prompt_is_needed_once_for_all_its_replies() -> None:
    pair = Needed.by(5, [2, 3], 5)
    # 15 pairs within the prompt; of the replies 5 and 6, then 5, 6 and 7 that stand before or are the token itself
    assert pair == Needed(10, 5, 15 + (6 + 7) + (6 + 7 + 8))
    assert Needed.of_all([pair, pair]) == Needed(20, 10, 2 * 49)


def test_operations_are_those_that_pytorch_counts() -> None:
    """But for the first layer's inputs, which need no gradient, and attention, which it does not count on a CPU."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    params = method({**LORA, "rank": 4, "targets": "all-linear"}, SFT)
    model = make_trainable(LlamaForCausalLM(LLAMA).requires_grad_(False), params.adapter).train()
    row = TokenRow(list(range(3, 43)), [False] * 20 + [True] * 20, 20)
    loss_of(model, [(row,)], params)  # what the model can do is found out before the first step, and once
    with FlopCounterMode(display=False) as counter:
        loss_of(model, [(row,)], params)[0].backward()
    needed = Needed.by(20, [20], 20)
    products = operations_of(model).of(needed._replace(pairs_attended=0))
    assert products == pytest.approx(counter.get_total_flops(), rel=0.05)
    # two products forwards and four backwards, of which causal attention needs half
    assert operations_of(model).of(needed) - products == 12 * 6 * 2 * 64 * (40 * 41 // 2)


def test_a_model_without_attention_has_none_to_count() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    assert operations_of(MambaForCausalLM(config)).pair == 0


def test_every_matrix_is_counted_once_whatever_its_class() -> None:
    from transformers import GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = make_trainable(GPT2LMHeadModel(config).requires_grad_(False), method(LORA, SFT).adapter)
    frozen = sorted(shape for shape, trained in matrices(model) if not trained)
    assert frozen == sorted(2 * [(32, 96), (32, 32), (32, 128), (128, 32)])
