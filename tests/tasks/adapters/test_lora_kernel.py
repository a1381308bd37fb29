"""LoRA's update in one pass, against PEFT's own arithmetic and float64's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tasks.adapters.attach import init_adapter
from tests.helpers.samples import LORA, QLORA, SFT, method

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(params=["lora", "dropout", "rslora", "nf4"])
def adapted(request: pytest.FixtureRequest, pico_base: Path) -> PeftModel:
    adapter: dict[str, Any] = {
        "lora": LORA,
        "dropout": {**LORA, "dropout": 0.3},
        "rslora": {**LORA, "name": "rslora"},
        "nf4": {**QLORA, "compute_dtype": "float32"},
    }[request.param]
    torch.manual_seed(0)
    model = init_adapter(pico_base, method(adapter, SFT).adapter).train()
    assert isinstance(model, PeftModel)
    for parameter in trained(model):
        parameter.data = 0.05 * torch.randn_like(parameter)
    return model


def trained(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def variants(model: PeftModel) -> Iterator[dict[str, Any]]:
    return (module.lora_variant for module in model.modules() if hasattr(module, "lora_variant"))


def logits_and_gradients(model: PeftModel) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in trained(model) if parameter.grad is not None)]


def test_logits_and_gradients_are_peft_s_own(adapted: PeftModel) -> None:
    assert all("default" in variant for variant in variants(adapted))
    ours = logits_and_gradients(adapted)
    for variant in variants(adapted):
        variant.clear()
    theirs = logits_and_gradients(adapted)
    assert len(ours) == len(theirs) == 1 + len(trained(adapted))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-5 * other.norm()


def test_without_gradients_it_is_peft_s_own_to_the_bit(adapted: PeftModel) -> None:
    with torch.no_grad():
        ours = adapted.eval()(input_ids=IDS).logits
        for variant in variants(adapted):
            variant.clear()
        assert torch.equal(ours, adapted(input_ids=IDS).logits)


def test_what_is_merged_and_taken_out_again_is_peft_s_own(pico_base: Path) -> None:
    model = init_adapter(pico_base, method(LORA, SFT).adapter).eval()
    assert isinstance(model, PeftModel)
    for parameter in trained(model):
        parameter.data = 0.05 * torch.randn_like(parameter)

    def weights() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in model.state_dict().items() if ".base_layer." in name}

    before = weights()
    found = []
    for safe in (False, True):
        model.base_model.merge_adapter(safe_merge=safe)
        found.append(weights())
        model.base_model.unmerge_adapter()
        torch.testing.assert_close(weights(), before)
    for variant in variants(model):
        variant.clear()
    model.base_model.merge_adapter()
    for merged in found:
        assert all(torch.equal(merged[name], weight) for name, weight in weights().items())


def test_the_derivatives_are_those_of_differences() -> None:
    from tasks.adapters.lora_kernel import _Update

    torch.manual_seed(0)
    shapes = ((2, 3, 5), (2, 3, 4), (2, 4), (5, 2))
    result, *others = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def updated(result: Tensor, *others: Tensor) -> Tensor:
        found: Tensor = _Update.apply(result.clone(), *others, 1.7)  # type: ignore[no-untyped-call]
        return found

    assert torch.autograd.gradcheck(updated, (result, *others))


def test_other_variants_stay_as_they_are(pico_base: Path) -> None:
    model = init_adapter(pico_base, method({**LORA, "name": "dora"}, SFT).adapter)
    assert isinstance(model, PeftModel)
    assert {type(v).__module__ for variant in variants(model) for v in variant.values()} == {
        "peft.tuners.lora.variants"
    }
