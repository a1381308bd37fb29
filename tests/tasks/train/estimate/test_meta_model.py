from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, OPTConfig, PreTrainedConfig

from tasks.adapters.attach import init_adapter
from tasks.adapters.params import QloraAdapter
from tasks.core.errors import BadModel
from tasks.models.device import compute_dtype
from tasks.train.estimate.meta_model import count, meta_model, read_model_config, tensors_of, to_fake_tensors
from tests.helpers.samples import LEARNT_PROMPTS, LORA, LORA_8_BIT, LOREFT, QLORA, SFT, method

BOFT = {"name": "peft", "method": "BOFT", "config": {}}
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
MISTRAL_7B = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
)
MT0_LARGE = {
    "model_type": "mt5",
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 16,
    "vocab_size": 250112,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""As published; transformers 5 forgets that the head has weights of its own."""
OPT_6_7B = OPTConfig(
    hidden_size=4096,
    ffn_dim=16384,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=50272,
    word_embed_proj_dim=4096,
)


def lora(rank: int, *targets: str) -> dict[str, Any]:
    return {**LORA, "rank": rank, "targets": list(targets) or "all-linear"}


@pytest.mark.parametrize(
    ("config", "adapter", "trained", "every", "share"),
    [
        # the README of PEFT 0.3 to 0.13: its first example
        (MT0_LARGE, lora(8, "q", "v"), 2_359_296, 1_231_940_608, "0.1915"),
        # PEFT's notebook of 8-bit OPT
        (OPT_6_7B, lora(16, "q_proj", "v_proj"), 8_388_608, 6_666_862_592, "0.1258"),
        # alpaca-lora's first settings, as its issues print them; the shape is the same as Llama-2-7B's
        (LLAMA_2_7B, lora(8, "q_proj", "v_proj"), 4_194_304, 6_742_609_920, "0.0622"),
        # QLoRA's targets with rank 16
        (LLAMA_2_7B, lora(16), 39_976_960, 6_778_392_576, "0.5898"),
        (MISTRAL_7B, lora(8, "q_proj", "v_proj"), 3_407_872, 7_245_139_968, "0.0470"),
        # pyreft's README
        (LLAMA_2_7B, {**LOREFT, "rank": 4, "layers": [15]}, 32_772, 6_738_448_388, "0.0005"),
        # 2r(d + w) summed over seven maps of 32 layers, by hand: 2,621,440 r
        (LLAMA_3_8B, lora(16), 41_943_040, 8_072_204_288, "0.5196"),
    ],
    ids=["mt0-large", "opt-6.7b", "llama-2-7b q v", "llama-2-7b all", "mistral-7b", "reft", "llama-3-8b"],
)
def test_parameters_are_those_that_are_known(
    config: PreTrainedConfig | dict[str, Any],
    adapter: dict[str, Any],
    trained: int,
    every: int,
    share: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    published = config if isinstance(config, dict) else config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(published))
    model: Any = meta_model(read_model_config(tmp_path), method(adapter, SFT).adapter, torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert count(model) == (trained, every)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,} || all params: {every:,} || trainable%: {share}\n"
    )


def test_a_4_bit_weight_counts_its_numbers() -> None:
    plain, packed = (meta_model(LLAMA_2_7B, method(each, SFT).adapter, torch.bfloat16) for each in (LORA, QLORA))
    assert count(plain) == count(packed)


def test_without_an_adapter_everything_is_trained() -> None:
    assert count(meta_model(LLAMA_2_7B, None, torch.float32)) == (6_738_415_616, 6_738_415_616)


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        QLORA,
        {**QLORA, "double_quantization": False},
        {**QLORA, "quantization": "fp4"},
        LORA_8_BIT,
        LOREFT,
        *LEARNT_PROMPTS.values(),
    ],
    ids=["lora", "nf4", "nf4 once", "fp4", "8 bits", "reft", *LEARNT_PROMPTS],
)
def test_a_hollow_model_holds_what_the_loaded_one_does(pico_base: Path, adapter: dict[str, Any]) -> None:
    params = method(adapter, SFT).adapter
    made = meta_model(read_model_config(pico_base), params, compute_dtype())
    to_fake_tensors(made, torch.device("cpu"))
    loaded = init_adapter(pico_base, params)

    def shapes(model: Any) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
        return [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]

    def held(model: Any) -> list[int]:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors_of(model)}
        return sorted(size for size in storages.values() if size > 4)  # offsets of 4 bytes come and go

    assert shapes(made) == shapes(loaded)
    assert held(made) == held(loaded)
    assert [type(module) for module in made.modules()] == [type(module) for module in loaded.modules()]


def test_4_bit_weights_take_half_a_byte_and_their_constants() -> None:
    """Blocks of 64 have a constant: a float, or a byte and a 256th of a float (sections 2 and 3 of the QLoRA paper)."""
    bits = {}
    for double in (False, True):
        adapter = QloraAdapter.model_validate({**QLORA, "double_quantization": double})
        model = meta_model(LLAMA_2_7B, adapter, torch.bfloat16)
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
        to_fake_tensors(layer, torch.device("cpu"))
        bits[double] = sum(tensor.nbytes for tensor in tensors_of(layer)) * 8 / (4096 * 11008)
    assert bits[False] == pytest.approx(4 + 32 / 64, abs=0.001)
    assert bits[True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.001)


def test_8_bit_weights_take_a_byte_and_a_float_for_each_row() -> None:
    """Vector-wise quantization (section 2.1 of LLM.int8(), arXiv:2208.07339)."""
    model = meta_model(LLAMA_2_7B, method(LORA_8_BIT, SFT).adapter, torch.bfloat16)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    to_fake_tensors(layer, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in tensors_of(layer)) == 4096 * 11008 + 4 * 11008


def test_a_config_is_read_from_a_folder_or_a_file_of_any_name(pico_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "shape of mine.json"
    other.write_bytes((pico_base / "config.json").read_bytes())
    read, expected = read_model_config(other), AutoConfig.from_pretrained(pico_base)
    assert read.to_diff_dict() == expected.to_diff_dict() == read_model_config(pico_base).to_diff_dict()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no config.json"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "no-such"}', "not the config of a known architecture"),
        ("{}", "not the config of a known architecture"),
        ('{"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}', "asks to run its own code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not the config of a known architecture"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "not the config of a known architecture"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "has no layers"),
        ('{"model_type": "t5", "num_layers": 0}', "has no layers"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadModel, match=said):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "adapter", "said"),
    [
        ({"model_type": "vit"}, LORA, "no model can be made of this config"),
        (
            {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": -1},
            LORA,
            "no model can be made of this config",
        ),
        ({"model_type": "gpt2", "n_layer": 1}, {**LORA, "targets": ["q_proj"]}, "the adapter does not fit this model"),
        ({"model_type": "gpt2", "n_layer": 1}, {**LOREFT, "layers": [7]}, "the adapter does not fit this model"),
        ({"model_type": "llama", "num_hidden_layers": 1}, BOFT, "cannot be made without weights"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], adapter: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match=said):
        meta_model(read_model_config(tmp_path), method(adapter, SFT).adapter, torch.float32)
