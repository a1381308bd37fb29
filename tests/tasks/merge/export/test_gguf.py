"""GGUF files, read back by transformers, whose reader knows nothing of this writer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.core.errors import BadModel
from tasks.merge.export.gguf import vocabulary_of, write_gguf
from tests.conftest import ROOT

TEXTS = ["Once upon a time, there were 12 dogs.", "你好, <x>  y\n\nz", "a"]


def read_back(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def check_same(folder: Path, path: Path, tolerance: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = AutoTokenizer.from_pretrained(folder)
    second, tokenizer = read_back(path)
    for text in TEXTS:
        ids = own(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        with torch.no_grad():
            one, two = (model(torch.tensor([ids])).logits for model in (first, second))
        assert (one - two).abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.0), ("float16", 1e-4)])
def test_the_shipped_model_reads_back_as_it_was(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Its weights are bfloat16: only float16 can lose something, of numbers too small for it."""
    write_gguf(ROOT / "models" / "tiny", tmp_path / "m.gguf", dtype)
    check_same(ROOT / "models" / "tiny", tmp_path / "m.gguf", tolerance)


def test_a_real_llama_with_characters_and_bytes_reads_back(real_data: Path, tmp_path: Path) -> None:
    """Grouped queries, tied embeddings, a tokenizer that falls back on bytes."""
    write_gguf(real_data / "stories260k" / "hf", tmp_path / "m.gguf", "float32")
    check_same(real_data / "stories260k" / "hf", tmp_path / "m.gguf", 0.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "llama"])
def test_other_families_read_back(tmp_path: Path, family: str) -> None:
    """With biases (Qwen 2), norms of queries and keys (Qwen 3), a head of its own, Llama 3.1's positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = AutoConfig.for_model(
        family,
        vocab_size=1536,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if family == "qwen3" else 8,  # the reader knows no other of Qwen 3
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **({"rope_parameters": {**rope, "original_max_position_embeddings": 32}} if family == "llama" else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.normal_(1.0, 0.1)
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "models" / "tiny" / file, tmp_path / "model" / file)
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "float32")
    if family == "llama":  # transformers passes over the factors of frequencies: they are compared themselves
        from gguf import GGUFReader

        (factors,) = (t.data for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
        plain = 500.0 ** -(np.arange(0, 8, 2) / 8)
        np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
        return
    check_same(tmp_path / "model", tmp_path / "m.gguf", 1e-6)


def test_eight_bits_are_those_of_the_package(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize, quantize
    from safetensors.torch import load_file

    write_gguf(ROOT / "models" / "tiny", tmp_path / "m.gguf", "q8_0")
    weights = load_file(ROOT / "models" / "tiny" / "model.safetensors")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    down = found["blk.0.ffn_down.weight"]
    want = weights["model.layers.0.mlp.down_proj.weight"].float().numpy()
    assert np.array_equal(
        dequantize(down.data, down.tensor_type), dequantize(quantize(want, down.tensor_type), down.tensor_type)
    )
    assert np.array_equal(found["output_norm.weight"].data, weights["model.norm.weight"].float().numpy())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(ROOT / "models" / "tiny", tmp_path / name, "float16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("config.json", {"model_type": "gpt_neox"}, "no form in GGUF"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, "scales its positions"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "splits texts by rules"),
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "is no BPE"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(tmp_path: Path, file: str, change: dict[str, Any], what: str) -> None:
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "model")
    told = json.loads((tmp_path / "model" / file).read_text())
    (tmp_path / "model" / file).write_text(json.dumps({**told, **change}))
    with pytest.raises(BadModel, match=what):
        write_gguf(tmp_path / "model", tmp_path / "m.gguf", "float16")


def test_tokens_of_a_vocabulary_smaller_than_the_model_are_filled_up() -> None:
    from gguf import TokenType

    found = vocabulary_of(ROOT / "models" / "tiny", 1600)
    assert len(found.tokens) == len(found.types) == 1600
    assert found.tokens[1599] == "[unused1599]"
    assert found.types[1599] == TokenType.UNUSED
    with pytest.raises(BadModel, match="has more tokens than the model"):
        vocabulary_of(ROOT / "models" / "tiny", 1000)
    assert found.tokens[:3] == ["<|pad|>", "<|im_start|>", "<|im_end|>"]
