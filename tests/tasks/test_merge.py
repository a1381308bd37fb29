from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tasks.adapted import CONFIG, WEIGHTS, fresh, load_adapted, load_packaged, publish
from tasks.adapter_params import LoraAdapter, QloraAdapter
from tasks.errors import BadModel
from tasks.merge import dequantized, difference, dora_norms, lora_updates, merge_shards
from tasks.models import load_model
from tests.samples import QLORA

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
    merge_shards(pico_base, lora_updates(adapter), {}, tmp_path)
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


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_lora_and_its_variants_merge_as_peft_merges_them(pico_base: Path, tmp_path: Path, name: str) -> None:
    """In float32 within its rounding, by PEFT's own merge_and_unload."""
    torch.manual_seed(1)
    chosen = {key: value for key, value in QLORA.items() if "quantiz" not in key}
    model: Any = fresh(
        pico_base, LoraAdapter.model_validate({**chosen, "name": name, "targets": r".*(q_proj|up_proj)"})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    publish(model, tmp_path)
    theirs = dict(model.float().merge_and_unload().named_parameters())
    base = tmp_path / "base"
    base.mkdir()
    save_file({k: v.float() for k, v in load_file(pico_base / "model.safetensors").items()}, base / "model.safetensors")
    (tmp_path / "out").mkdir()
    updates = lora_updates(tmp_path)
    merge_shards(base, updates, {}, tmp_path / "out", dora_norms(tmp_path))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert len(updates) == 4
    for weight, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[weight].data, rtol=1e-5, atol=1e-6)
        assert weight in updates or torch.equal(tensor, theirs[weight].data)


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
    merge_shards(base, lora_updates(adapter), replaced, out)
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
        merge_shards(pico_base, {"model.layers.7.self_attn.q_proj.weight": torch.zeros(16, 16)}, {}, tmp_path)


def test_shards_stay_apart(pico_base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tensors = load_file(pico_base / "model.safetensors")
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in chosen}, tmp_path / "base" / f"model-{part}.safetensors")
    (tmp_path / "out").mkdir()
    merge_shards(tmp_path / "base", lora_updates(adapter), {}, tmp_path / "out")
    merge_shards(pico_base, lora_updates(adapter), {}, tmp_path)
    one = load_file(tmp_path / "model.safetensors")
    two = {k: v for part in (0, 1) for k, v in load_file(tmp_path / "out" / f"model-{part}.safetensors").items()}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_variant_that_is_not_merged_yet_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    text = (tmp_path / "a" / CONFIG).read_text()
    (tmp_path / "a" / CONFIG).write_text(text.replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'))
    with pytest.raises(BadModel, match="not merged yet"):
        lora_updates(tmp_path / "a")
