from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tasks.inference.frozen_layer_cache import FrozenLayerCache
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tests.tasks.adapters.reft.test_reft import DECODERS, pico_model, with_reft

ROWS = [
    TokenRow([3, 4, 5, 6, 7, 8], [False] * 4 + [True] * 2, 4),
    TokenRow([9, 10, 11, 12], [False] * 1 + [True] * 3, 1),
    TokenRow([13, 14, 15, 16, 17, 18, 19], [False] * 5 + [True, False], 5),
]
SHAPES = [(len(row.ids), row.prompt_tokens) for row in ROWS]


def without_dropout(kind: str) -> Any:
    model = pico_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def model_of(kind: str, **changes: Any) -> Any:
    return with_reft(without_dropout(kind), **changes).train()


def trained(model: Any, below: FrozenLayerCache | None, times: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and gradients of the last of several passes."""
    for _ in range(times):
        model.zero_grad()
        scored = score_tokens(model, ROWS, below)
        scored.row_means().sum().backward()
    return scored.logp.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(model: Any, below: FrozenLayerCache) -> None:
    """Values and gradients with what is kept are those without."""
    expected, gradients = trained(model, None, 1)
    assert gradients
    for times in (1, 2):  # while it is filled, and afterwards
        found, again = trained(model, below, times)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert again.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "falcon"])
@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "last", "layers": [1]},
        {"positions": "l2", "layers": "all"},
        {"positions": "f1+l2", "layers": [1, 2]},
        {"positions": "all", "layers": [2]},
        {"positions": "last", "layers": [2], "component": "mlp_output"},
    ],
    ids=str,
)
def test_what_is_kept_gives_the_values_and_gradients_of_what_is_not(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    below = FrozenLayerCache.of(model, SHAPES, 1 << 20)
    assert below is not None
    check_same(model, below)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "falcon"])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_so_it_does_below_the_first_layer_that_other_adapters_change(kind: str, name: str) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    model = without_dropout(kind)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and ".2." in n]
    given: Any = {"target_modules": linear, "fan_in_fan_out": kind == "gpt2"}
    config = (
        IA3Config(feedforward_modules=[], **given) if name == "ia3" else LoraConfig(use_dora=name == "dora", **given)
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    below = FrozenLayerCache.of(adapted, SHAPES, 1 << 20)
    assert below is not None
    assert below._cut == 2
    check_same(adapted, below)


def test_nothing_is_kept_where_something_below_is_changed_or_drops_out() -> None:
    from peft import LoraConfig, get_peft_model

    upper = ["layers.2.self_attn.q_proj"]

    def below_of(model: Any, **given: Any) -> FrozenLayerCache | None:
        return FrozenLayerCache.of(
            get_peft_model(model, LoraConfig(**{"target_modules": upper, **given})).train(), SHAPES, 1 << 20
        )

    assert below_of(pico_model()) is not None
    assert below_of(pico_model(tie_word_embeddings=False), modules_to_save=["lm_head"]) is not None
    assert below_of(pico_model(), modules_to_save=["input_layernorm"]) is None
    assert below_of(pico_model("qwen2"), bias="all") is None
    assert below_of(pico_model(), target_modules=["embed_tokens", *upper]) is None
    assert below_of(pico_model(attention_dropout=0.1)) is None
    gpt2 = {"target_modules": ["h.2.attn.c_attn"], "fan_in_fan_out": True}
    drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    assert below_of(pico_model("gpt2", **drops), **gpt2) is not None
    assert below_of(pico_model("gpt2", **{**drops, "embd_pdrop": 0.1}), **gpt2) is None
    assert below_of(pico_model("gpt2", **drops), **{**gpt2, "target_modules": ["wpe", "h.2.attn.c_attn"]}) is None


def test_a_row_gives_the_same_bits_whenever_and_beside_whatever_it_comes() -> None:
    model = model_of("llama", positions="last", layers=[1])
    one, two = (FrozenLayerCache.of(model, SHAPES, 1 << 20) for _ in range(2))
    assert one is not None
    assert two is not None
    for row in ROWS:
        one._state(row.ids, row.prompt_tokens)
    score_tokens(model, ROWS[::-1], two)
    for row in ROWS:
        kept, other = (each._state(row.ids, row.prompt_tokens) for each in (one, two))
        assert torch.equal(kept.hidden, other.hidden)
        assert kept.attention is not None
        assert other.attention is not None
        assert torch.equal(kept.attention, other.attention)


def test_fewer_layers_run_and_fewer_tokens() -> None:
    model = model_of("llama", positions="last", layers=[1])
    below = FrozenLayerCache.of(model, SHAPES, 1 << 20)
    trained(model, below, 1)
    seen: list[tuple[int, ...]] = []
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    trained(model, below, 1)
    assert seen == [(3, 4, 16)]  # the layer above the edit, on the last prompt token and three of a reply at most


def test_where_nothing_can_be_kept_nothing_is() -> None:
    assert FrozenLayerCache.of(pico_model(), SHAPES, 1 << 20) is None
    assert FrozenLayerCache.of(model_of("llama", layers=[0], component="mlp_output"), SHAPES, 1 << 20) is None
    assert FrozenLayerCache.of(model_of("llama"), SHAPES, 16) is None
    assert FrozenLayerCache.of(with_reft(pico_model("gpt2")), SHAPES, 1 << 20) is None  # it has dropout
    assert FrozenLayerCache.of(model_of("falcon"), SHAPES, 1 << 20) is None  # its layers give more than a tensor
    hidden_alone = FrozenLayerCache.of(model_of("llama"), SHAPES, 17 * 16 * 4)
    assert hidden_alone is not None
    assert hidden_alone._state(ROWS[0].ids, 4).attention is None
