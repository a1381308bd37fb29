"""Baichuan against transformers' Llama with the same weights, each projection on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.core.errors import BadModel
from tasks.models.loader import load_model
from tasks.tokenization.baichuan import VOCABULARY_OF_2, BaichuanConfig, BaichuanForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def as_llama(model: BaichuanForCausalLM, **sizes: Any) -> Any:
    llama: Any = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    state = {}
    for name, weight in model.state_dict().items():
        if "W_pack" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                state[name.replace("W_pack", f"{part}_proj")] = rows
        else:
            state[name] = weight
    llama.load_state_dict(state)
    return llama.eval()


def test_its_logits_and_answers_are_those_of_a_llama_with_the_projections_apart() -> None:
    torch.manual_seed(0)
    model: Any = BaichuanForCausalLM(BaichuanConfig(**SIZES))
    model.eval()
    llama = as_llama(model)
    ids = torch.randint(1, 60, (2, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, attention_mask=mask).logits[mask.bool()] for each in (model, llama))
        torch.testing.assert_close(ours, theirs)
        told: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **told), llama.generate(ids, **told))


def test_the_second_has_a_head_of_rows_of_length_one() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {**SIZES, **small, "vocab_size": VOCABULARY_OF_2}
    model: Any = BaichuanForCausalLM(BaichuanConfig(**sizes))
    model.eval()
    llama = as_llama(model, **sizes)
    with torch.no_grad():
        llama.lm_head.weight.copy_(F.normalize(model.lm_head.weight))
        ids = torch.arange(9)[None]
        torch.testing.assert_close(model(ids).logits, llama(ids).logits)


def write(folder: Path, **changes: Any) -> Path:
    """As its makers publish it: with the address of code of their own."""
    BaichuanForCausalLM(BaichuanConfig(**SIZES)).save_pretrained(folder)
    path = folder / "config.json"
    told = {"auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}, **changes}
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    path.write_text(json.dumps({**kept, **{key: value for key, value in told.items() if value is not None}}))
    return folder


def test_the_code_that_its_makers_publish_is_never_run(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "modeling_baichuan.py").write_text("raise SystemExit")
    assert isinstance(load_model(tmp_path), BaichuanForCausalLM)


def test_the_variant_with_other_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"ALiBi \(13B\) is not supported"):
        load_model(write(tmp_path, max_position_embeddings=None, model_max_length=64))
