from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tasks.adapted import fresh, load_adapted, load_packaged, publish
from tasks.adapter_files import CONFIG, WEIGHTS
from tasks.adapter_params import (
    AdaloraAdapter,
    AnyAdapter,
    FullAdapter,
    Ia3Adapter,
    Int8Adapter,
    LoraAdapter,
    QloraAdapter,
)
from tasks.errors import BadModel
from tasks.merge import difference, merge_shards, untie
from tasks.models import load_model
from tasks.quantized import dequantized
from tasks.updates import changes_of
from tests.samples import ADALORA, IA3, LORA, QLORA

ADAPTER = QloraAdapter.model_validate(QLORA)
PROBES = [{"input_ids": list(range(5, 25))}, {"input_ids": list(range(40, 47))}]


@pytest.fixture(scope="module")
def adapter(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with numbers in it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = fresh(pico_base, ADAPTER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    publish(model, folder)
    return folder


def test_merged_tensors_are_the_float64_sum_rounded_once(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_shards(pico_base, changes_of(adapter), {}, tmp_path)
    base, merged = load_file(pico_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
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
    save_file({name: weight.data.float() for name, weight in model.named_parameters()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MERGED)
def test_what_changes_weights_is_merged_as_peft_merges_it(pico_base: Path, tmp_path: Path, name: str) -> None:
    """In float32 within its rounding, by PEFT's own merge_and_unload."""
    params, places = MERGED[name]
    base = write_base(load_model(pico_base), tmp_path / "base")
    torch.manual_seed(1)
    check_merged(fresh(pico_base, params, 100), base, tmp_path, places)


def check_merged(model: Any, base: Path, tmp_path: Path, places: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    (tmp_path / "adapter").mkdir()
    publish(model, tmp_path / "adapter")
    theirs = dict(model.float().merge_and_unload().named_parameters())
    (tmp_path / "out").mkdir()
    changes = changes_of(tmp_path / "adapter")
    merge_shards(base, changes, {}, tmp_path / "out")
    merged, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {weight for weight, tensor in merged.items() if not torch.equal(tensor, before[weight])}
    assert len(changed) == places
    assert changed <= changes.keys()
    for weight, tensor in merged.items():
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
    model = fresh(pico_base, params)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    (tmp_path / "adapter").mkdir()
    publish(model, tmp_path / "adapter")
    shutil.copytree(pico_base, tmp_path / "out")
    changes = changes_of(tmp_path / "adapter")
    merge_shards(pico_base, changes, {}, tmp_path / "out", untie(model, changes, tmp_path / "out"))
    merged: Any = load_packaged(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    head, before = merged.get_output_embeddings().weight, load_file(pico_base / "model.safetensors")
    assert torch.equal(head, before["model.embed_tokens.weight"])
    assert not torch.equal(head, merged.get_input_embeddings().weight)
    assert difference(model.eval(), merged, PROBES).mean_kl < 1e-4


def test_all_weights_are_those_that_were_trained_rounded_once(pico_base: Path, tmp_path: Path) -> None:
    model = fresh(pico_base, FullAdapter(name="full", modules="all"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    (tmp_path / "trained").mkdir()
    (tmp_path / "out").mkdir()
    publish(model, tmp_path / "trained")
    shutil.copyfile(pico_base / "config.json", tmp_path / "out" / "config.json")
    changes = changes_of(tmp_path / "trained")
    merge_shards(pico_base, changes, {}, tmp_path / "out", untie(model, changes, tmp_path / "out"))
    assert load_model(tmp_path / "out").config.tie_word_embeddings  # as it was
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(merged.pop(name), weight.to(torch.bfloat16))
    assert not merged


def test_what_the_eight_bit_weights_stand_for(pico_base: Path) -> None:
    """Each row in 127 steps of its largest number, before and after the first forward pass moves them."""
    model = load_model(pico_base, Int8Adapter.model_validate({**LORA, "name": "lora8bit", "outlier_threshold": 6.0}))
    base = load_file(pico_base / "model.safetensors")
    first = dequantized(model)
    model(input_ids=torch.arange(5, 25)[None])
    again = dequantized(model)
    assert len(first) == 14
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        step = base[name].float().abs().amax(1, keepdim=True) / 127
        assert ((weight - base[name].float()).abs() <= 0.51 * step).all()


def test_what_the_four_bit_weights_stand_for(pico_base: Path) -> None:
    """NF4's widest gap is 0.304 (between -1 and -0.696): no weight is further off than half of that, times the largest
    number of its block, plus what the double quantization does to that number (one part in 127 of its own block's)."""
    model = load_model(pico_base, ADAPTER)
    weights, base = dequantized(model), load_file(pico_base / "model.safetensors")
    assert len(weights) == 14
    for name, weight in weights.items():
        original = base[name].float()
        blocks = F.pad(original.flatten(), (0, -original.numel() % 64)).view(-1, 64)
        limit = blocks.abs().amax(1).repeat_interleave(64)[: original.numel()].view_as(original)
        assert ((weight - original).abs() <= 0.152 * limit + 0.02 * limit.max()).all()
        assert not torch.equal(weight, original)


def merged_model(base: Path, adapter: Path, out: Path, replaced: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(base, out)
    merge_shards(base, changes_of(adapter), replaced, out)
    return out


def test_merging_onto_what_was_trained_is_closer_than_onto_the_original(
    pico_base: Path, adapter: Path, tmp_path: Path
) -> None:
    trained = load_adapted(pico_base, adapter, ADAPTER)
    onto = {"original": {}, "dequantized": dequantized(trained)}
    found = {
        name: difference(trained, load_packaged(merged_model(pico_base, adapter, tmp_path / name, weights)), PROBES)
        for name, weights in onto.items()
    }
    assert found["dequantized"].mean_kl < found["original"].mean_kl / 10
    assert found["dequantized"].tokens == 27


def test_the_difference_is_the_kullback_leibler_divergence(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    """Against PyTorch's own, position by position."""
    first = load_model(pico_base)
    second = load_packaged(merged_model(pico_base, adapter, tmp_path / "m", {}))
    found = difference(first, second, PROBES)
    total, largest = 0.0, 0.0
    for probe in PROBES:
        with torch.no_grad():
            ids = torch.tensor([probe["input_ids"]])
            p, q = (m(input_ids=ids, use_cache=False).logits[0].double() for m in (first, second))
        total += F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum").item()
        largest = max(largest, (p - q).abs().max().item())
    assert found.mean_kl == pytest.approx(total / 27, rel=1e-4)
    assert found.max_logit_difference == pytest.approx(largest, rel=1e-6)
    assert difference(first, first, PROBES).mean_kl == 0.0


def test_an_update_without_a_place_is_refused(pico_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="no such weights"):
        merge_shards(pico_base, {"model.layers.7.self_attn.q_proj.weight": lambda weight: weight}, {}, tmp_path)


def test_shards_stay_apart(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = load_file(pico_base / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / "base" / f"model-{part}.safetensors")
    (tmp_path / "out").mkdir()
    merge_shards(tmp_path / "base", changes_of(adapter), {}, tmp_path / "out")
    merge_shards(pico_base, changes_of(adapter), {}, tmp_path)
    one = load_file(tmp_path / "model.safetensors")
    two = {k: v for part in (0, 1) for k, v in load_file(tmp_path / "out" / f"model-{part}.safetensors").items()}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_method_that_does_not_change_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    text = (tmp_path / "a" / CONFIG).read_text()
    (tmp_path / "a" / CONFIG).write_text(text.replace('"LORA"', '"OFT"'))
    with pytest.raises(BadModel, match="cannot be merged"):
        changes_of(tmp_path / "a")
