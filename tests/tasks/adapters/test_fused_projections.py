"""Low-rank updates of parts of fused projections, against each architecture's own split and loralib's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tasks.adapters.fused_projections import keep_parts_apart, rows_of_parts
from tasks.adapters.params import LoraAdapter
from tasks.adapters.peft_configs import peft_config
from tasks.core.errors import BadModel
from tests.helpers.samples import LORA

GPT2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "gpt2": (GPT2, "c_attn"),
    "mpt": (MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=60, max_seq_len=32), "Wqkv"),
    "phi3": (Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0), "qkv_proj"),
    "gpt_neox": (GPTNeoXConfig(**SIZES, intermediate_size=48), "query_key_value"),
    "bloom": (BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4), "query_key_value"),
    "falcon, each head": (
        FalconConfig(**SIZES, new_decoder_architecture=False, multi_query=False, alibi=False),
        "query_key_value",
    ),
    "falcon, one key": (
        FalconConfig(**SIZES, new_decoder_architecture=False, multi_query=True, alibi=False),
        "query_key_value",
    ),
    "falcon, groups": (FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2), "query_key_value"),
}


def model_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FUSED)
def test_the_rows_of_a_part_are_those_that_the_architecture_takes_for_it(name: str) -> None:
    """With the rows of k at zero every cached key is zero, with those of v every cached value, with those of q none."""
    config, leaf = FUSED[name]
    for part, (no_keys, no_values) in {"q": (False, False), "k": (True, False), "v": (False, True)}.items():
        model = model_of(config)
        for path, module in model.named_modules():
            if path.endswith(leaf):
                weight = module.weight.data.T if name == "gpt2" else module.weight.data
                parts = rows_of_parts(leaf, len(weight), model.config)
                assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(weight)))
                weight[parts[part]] = 0
                if module.bias is not None:
                    module.bias.data[parts[part]] = 0
        with torch.no_grad():
            cache = model(input_ids=torch.arange(5, 15)[None], use_cache=True).past_key_values
        for layer in cache.layers:
            assert (not layer.keys.any()) == no_keys
            assert (not layer.values.any()) == no_values


def adapted(config: PretrainedConfig, targets: dict[str, Any], name: str = "lora") -> Any:
    model = model_of(config)
    adapter = LoraAdapter.model_validate({**LORA, "name": name, "rank": 3, "alpha": 6.0, "targets": targets})
    model = get_peft_model(model, peft_config(adapter))
    assert isinstance(adapter.targets, dict)
    keep_parts_apart(model, adapter.targets)
    return model


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for step in range(steps):
        ids = torch.arange(step, step + 12)[None]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("name", "scale"), [("lora", 6 / 3), ("rslora", 6 / 3**0.5)])
def test_it_is_what_merged_linear_computes(name: str, scale: float) -> None:
    """loralib: A on the input, B's as the groups of one convolution, zeros between; scaled by a part's own rank."""
    model = adapted(GPT2, {"c_attn": ["q", "v"]}, name)
    train(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    assert a.shape == (2 * 3, 32)
    x = torch.randn(1, 7, 32)
    kernel = torch.cat([b[:32, :3], b[64:, 3:]])[:, :, None]  # the B's of q and of v
    both = F.conv1d(F.linear(x, a).transpose(1, 2), kernel, groups=2).transpose(1, 2)
    expected = F.pad(both[..., :32], (0, 64)) + F.pad(both[..., 32:], (64, 0))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(layer(x) - layer.base_layer(x), scale * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_training_leaves_the_other_parts_as_they_were(name: str) -> None:
    config, leaf = FUSED[name]
    model = adapted(config, {leaf: ["v"]})
    train(model)
    before = dict(model_of(config).named_parameters())
    for path, weight in model.merge_and_unload().named_parameters():
        difference = (weight - before[path]).detach()
        if not path.endswith(f"{leaf}.weight"):
            assert not difference.any()
            continue
        difference = difference.T if name == "gpt2" else difference
        parts = rows_of_parts(leaf, len(difference), config)
        assert not difference[parts["q"]].any()
        assert not difference[parts["k"]].any()
        assert (difference[parts["v"]].abs().amax(1) > 0).all()


def test_gate_and_up_are_parts_too() -> None:
    """The gate's rows at zero make what is gated zero: SiLU(0) is 0."""
    model = model_of(FUSED["phi3"][0])
    mlp = model.model.layers[0].mlp
    parts = rows_of_parts("gate_up_proj", mlp.gate_up_proj.out_features, model.config)
    mlp.gate_up_proj.weight.data[parts["up"]] = 1.0
    mlp.gate_up_proj.weight.data[parts["gate"]] = 0.0
    assert not mlp(torch.ones(1, 2, 32)).any()


def test_it_is_saved_as_an_ordinary_lora_adapter(tmp_path: Any) -> None:
    """PEFT alone loads it, and gives the same logits."""
    from peft import PeftModel

    model = adapted(GPT2, {"c_attn": ["k", "v"], "c_fc": "all"})
    train(model)
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(model_of(GPT2), tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert isinstance(theirs.peft_config["default"], LoraConfig)


@pytest.mark.parametrize(
    ("config", "targets", "said"),
    [
        (GPT2, {"c_fc": ["q"]}, "no fused projection whose parts are known"),
        (FUSED["phi3"][0], {"qkv_proj": ["gate"]}, "has no such parts"),
        (
            LlamaConfig(**SIZES, intermediate_size=48),
            {"q_proj": ["q"]},
            "no fused projection whose parts are known",
        ),
    ],
)
def test_parts_that_are_not_there_are_refused(config: PretrainedConfig, targets: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        adapted(config, targets)
