from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tasks.adapters.attach import init_adapter, load_adapted, load_packaged, save_adapter
from tasks.adapters.files import WEIGHTS
from tasks.adapters.params import (
    AdaloraAdapter,
    AnyAdapter,
    FullAdapter,
    Ia3Adapter,
    Int8Adapter,
    LoraAdapter,
    QloraAdapter,
)
from tasks.core.errors import NotEquivalent
from tasks.merge.merged_model import merge, write_merged
from tasks.merge.stage import base_candidates, check_equivalent, kl_divergence, merge_closest
from tasks.models.loader import load_model
from tasks.models.quantization import dequantized
from tasks.models.safetensors_reader import TensorSource
from tests.helpers.samples import ADALORA, IA3, LORA, QLORA

ADAPTER = QloraAdapter.model_validate(QLORA)
PROBES = [{"input_ids": list(range(5, 25))}, {"input_ids": list(range(40, 47))}]


@pytest.fixture(scope="module")
def adapter(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with numbers in it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = init_adapter(pico_base, ADAPTER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, folder)
    return folder


def merged_folder(base: Path, adapter: Path, out: Path, replaced: Mapping[str, TensorSource] | None = None) -> Path:
    out.mkdir()
    write_merged(base, adapter, {out: merge(base, adapter, "own", replaced or {})}, 1 << 30)
    return out


def test_merged_tensors_are_the_float64_sum_rounded_once(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    out = merged_folder(pico_base, adapter, tmp_path / "out")
    base, merged = load_file(pico_base / "model.safetensors"), load_file(out / "model.safetensors")
    lora = {name: tensor.double() for name, tensor in load_file(adapter / WEIGHTS).items()}
    changed = 0
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in lora:
            assert torch.equal(merged[name], weight)
            continue
        exact = weight.double() + 4.0 / 2 * lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
        # the sum in float32 may fall on the other side of a rounding boundary of bf16, one time in many thousand
        assert (merged[name] != exact.to(torch.bfloat16)).float().mean() < 1e-3
        assert merged[name].dtype == torch.bfloat16
        changed += 1
    assert changed == 14  # seven projections in each of two layers


MERGED: dict[str, tuple[AnyAdapter, int]] = {
    **{
        name: (LoraAdapter.model_validate({**LORA, "name": name, "targets": r".*(q_proj|up_proj)"}), 4)
        for name in ("lora", "rslora", "dora")
    },
    "embeddings": (LoraAdapter.model_validate({**LORA, "name": "lora", "targets": ["embed_tokens", "o_proj"]}), 3),
    "patterns": (
        LoraAdapter.model_validate(
            {
                **LORA,
                "name": "rslora",
                "rank": {"others": 2, "layers.0.*q_proj": 5},
                "alpha": {"others": 4.0, "k_proj": 3.0},
                "targets": ["q_proj", "k_proj"],
            }
        ),
        4,
    ),
    "adalora": (AdaloraAdapter.model_validate({**ADALORA, "targets": ["v_proj", "down_proj"]}), 4),
    "ia3": (Ia3Adapter.model_validate(IA3), 6),
}


def write_base(model: Any, folder: Path) -> Path:
    """A model's weights in float32, by the names that they have without an adapter."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file({name: weight.data.float() for name, weight in model.named_parameters()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MERGED)
def test_what_changes_weights_is_merged_as_peft_merges_it(pico_base: Path, tmp_path: Path, name: str) -> None:
    """In float32 within its rounding, by PEFT's own merge_and_unload."""
    params, places = MERGED[name]
    base = write_base(load_model(pico_base), tmp_path / "base")
    torch.manual_seed(1)
    check_merged(init_adapter(pico_base, params, 100), base, tmp_path, places)


def check_merged(model: Any, base: Path, tmp_path: Path, places: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    theirs = dict(model.float().merge_and_unload().named_parameters())
    out = merged_folder(base, tmp_path / "adapter", tmp_path / "out")
    merged, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert merged.keys() - before.keys() <= {"lm_head.weight"}  # untied
    changed = {weight for weight, tensor in before.items() if not torch.equal(tensor, merged[weight])}
    assert len(changed) == places
    for weight in before:
        tensor = merged[weight]
        torch.testing.assert_close(tensor, theirs[weight].data, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_weights_that_lie_the_other_way_are_merged_as_peft_merges_them(tmp_path: Path, kind: str) -> None:
    """GPT-2's linear layers hold (in, out)."""
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    base = write_base(model, tmp_path / "base")
    targets = ["c_attn", "c_proj"]
    config = (
        IA3Config(target_modules=targets, feedforward_modules=["c_proj"], fan_in_fan_out=True)
        if kind == "ia3"
        else LoraConfig(r=2, target_modules=targets, use_dora=kind == "dora", fan_in_fan_out=True)
    )
    # IA3 scales the bias of c_attn, too; c_proj is in attention and MLP
    check_merged(get_peft_model(model, config), base, tmp_path, 6 + 2 * (kind == "ia3"))


def test_an_embedding_that_is_also_the_head_is_untied(pico_base: Path, tmp_path: Path) -> None:
    """The adapter changes what tokens are read as; the head compares with what it did before."""
    params = MERGED["embeddings"][0]
    torch.manual_seed(2)
    model = init_adapter(pico_base, params)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    merged: Any = load_packaged(merged_folder(pico_base, tmp_path / "adapter", tmp_path / "out"))
    assert not merged.config.tie_word_embeddings
    head, before = merged.get_output_embeddings().weight, load_file(pico_base / "model.safetensors")
    assert torch.equal(head, before["model.embed_tokens.weight"])
    assert not torch.equal(head, merged.get_input_embeddings().weight)
    assert kl_divergence(model.eval(), merged, PROBES).mean_kl < 1e-4


def test_all_weights_are_those_that_were_trained_rounded_once(pico_base: Path, tmp_path: Path) -> None:
    model = init_adapter(pico_base, FullAdapter(name="full", modules="all"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    (tmp_path / "trained").mkdir()
    save_adapter(model, tmp_path / "trained")
    merged_folder(pico_base, tmp_path / "trained", tmp_path / "out")
    assert load_model(tmp_path / "out").config.tie_word_embeddings  # as it was
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(merged.pop(name), weight.to(torch.bfloat16))
    assert not merged


def test_what_the_eight_bit_weights_stand_for(pico_base: Path) -> None:
    """Each row in 127 steps of its largest number, before and after the first forward pass moves them."""
    model = load_model(
        pico_base, Int8Adapter.model_validate({**LORA, "name": "lora8bit", "outlier_threshold": 6.0}).base_quantization
    )
    base = load_file(pico_base / "model.safetensors")
    first = {name: make() for name, make in dequantized(model).items()}
    model(input_ids=torch.arange(5, 25)[None])
    again = {name: make() for name, make in dequantized(model).items()}
    assert len(first) == 14
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        step = base[name].float().abs().amax(1, keepdim=True) / 127
        assert ((weight - base[name].float()).abs() <= 0.51 * step).all()


def test_what_the_four_bit_weights_stand_for(pico_base: Path) -> None:
    """NF4's widest gap is 0.304 (between -1 and -0.696): no weight is further off than half of that, times the largest
    number of its block, plus what the double quantization does to that number (one part in 127 of its own block's)."""
    model = load_model(pico_base, ADAPTER.base_quantization)
    weights = {name: make() for name, make in dequantized(model).items()}
    base = load_file(pico_base / "model.safetensors")
    assert len(weights) == 14
    for name, weight in weights.items():
        original = base[name].float()
        blocks = F.pad(original.flatten(), (0, -original.numel() % 64)).view(-1, 64)
        limit = blocks.abs().amax(1).repeat_interleave(64)[: original.numel()].view_as(original)
        assert ((weight - original).abs() <= 0.152 * limit + 0.02 * limit.max()).all()
        assert not torch.equal(weight, original)


def test_of_both_bases_the_closer_is_taken(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    """And it is ten times closer than what PEFT makes, which rounds the sum to four bits again."""
    from peft import PeftModel

    trained = load_adapted(pico_base, adapter, ADAPTER)
    told, digests = merge_closest(pico_base, adapter, trained, PROBES, tmp_path, onto="closest", most_bytes=1 << 30)
    assert told["onto"].keys() == {"original", "dequantized"}
    assert told["mean_kl"] == min(each["mean_kl"] for each in told["onto"].values())
    assert told["form"] == "merged onto the dequantized weights"
    assert told["onto"]["dequantized"]["mean_kl"] < told["onto"]["original"]["mean_kl"] / 10
    assert told["tokens"] == 27
    assert digests.keys() == {path.name for path in tmp_path.iterdir()}
    assert kl_divergence(trained, load_packaged(tmp_path), PROBES).mean_kl == told["mean_kl"]
    again = load_adapted(pico_base, adapter, ADAPTER)
    assert isinstance(again, PeftModel)
    theirs = kl_divergence(trained, again.merge_and_unload(), PROBES)
    assert told["mean_kl"] < theirs.mean_kl / 10


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_one_of_both_may_be_chosen(pico_base: Path, adapter: Path, tmp_path: Path, onto: str) -> None:
    trained = load_adapted(pico_base, adapter, ADAPTER)
    (tmp_path / "a").mkdir()
    told, _ = merge_closest(pico_base, adapter, trained, PROBES, tmp_path / "a", onto=onto, most_bytes=1 << 30)
    assert list(told["onto"]) == [onto]
    one = merged_folder(pico_base, adapter, tmp_path / "b", base_candidates(trained, pico_base, onto)[onto])
    assert (one / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kl", [0.02, float("nan")])
def test_a_model_that_is_too_far_off_is_refused(kl: float) -> None:
    check_equivalent({"mean_kl": 0.01}, 0.01, "qlora")
    with pytest.raises(NotEquivalent, match="not the model that was trained"):
        check_equivalent({"mean_kl": kl}, 0.01, "qlora")


def test_the_difference_is_the_kullback_leibler_divergence(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    """Against PyTorch's own, position by position."""
    first = load_model(pico_base)
    second = load_packaged(merged_folder(pico_base, adapter, tmp_path / "m"))
    found = kl_divergence(first, second, PROBES)
    total, largest = 0.0, 0.0
    for probe in PROBES:
        with torch.no_grad():
            ids = torch.tensor([probe["input_ids"]])
            p, q = (m(input_ids=ids, use_cache=False).logits[0].double() for m in (first, second))
        total += F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum").item()
        largest = max(largest, (p - q).abs().max().item())
    assert found.mean_kl == pytest.approx(total / 27, rel=1e-4)
    assert found.max_logit_difference == pytest.approx(largest, rel=1e-6)
    assert kl_divergence(first, first, PROBES).mean_kl == 0.0
