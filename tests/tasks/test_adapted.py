from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapted import attach, fresh, load_adapted, publish, published_state
from tasks.adapter_files import CONFIG, WEIGHTS
from tasks.adapter_params import AnyAdapter, BottleneckAdapter, LoraAdapter, PeftAdapter, QloraAdapter, ReftAdapter
from tasks.errors import BadModel
from tasks.models import Model, load_model
from tests.samples import LOREFT, QLORA

LORA = {key: value for key, value in QLORA.items() if "quantiz" not in key}
ADAPTERS: dict[str, AnyAdapter] = {
    "qlora": QloraAdapter.model_validate(QLORA),
    **{name: LoraAdapter.model_validate({**LORA, "name": name}) for name in ("lora", "rslora", "dora")},
    **{
        name: ReftAdapter.model_validate({**LOREFT, "name": name})
        for name in ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
    },
    **{
        form: BottleneckAdapter.model_validate(
            {
                "name": "bottleneck",
                "form": form,
                "reduction_factor": 8.0,
                "non_linearity": "gelu",
                "scaling": 2.0,
                "layers": "all",
                "dropout": 0.0,
            }
        )
        for form in ("houlsby", "pfeiffer", "parallel")
    },
    "ia3": PeftAdapter(
        name="peft",
        method="ia3",
        config={"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "oft": PeftAdapter(name="peft", method="OFT", config={"target_modules": "all-linear", "oft_block_size": 8}),
}


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    return result


def trained(base: Path, name: str) -> Any:
    """An adapter with numbers in it, as a training would leave them."""
    torch.manual_seed(0)
    model = fresh(base, ADAPTERS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_elsewhere_it_is_the_same_model_bit_for_bit(
    pico_base: Path, tmp_path: Path, name: str
) -> None:
    model = trained(pico_base, name)
    publish(model, tmp_path)
    again = load_adapted(pico_base, tmp_path, ADAPTERS[name])
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load_model(pico_base)))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_published_form_is_the_same_twice(pico_base: Path, tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        publish(trained(pico_base, name), tmp_path / folder)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_lora_adapter_loads_in_peft_itself(pico_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained(pico_base, "qlora")
    publish(model, tmp_path)
    theirs = PeftModel.from_pretrained(load_model(pico_base, QloraAdapter.model_validate(QLORA)), tmp_path)
    assert torch.equal(logits(theirs), logits(model))


MARKS = {
    "ia3": "ia3_",
    "oft": "oft_",
    **dict.fromkeys([name for name in ADAPTERS if "reft" in name], "reft.reft_edits."),
    **dict.fromkeys(("houlsby", "pfeiffer", "parallel"), "bottleneck.bottleneck_parts."),
}


def test_only_the_adapter_is_trained(pico_base: Path) -> None:
    for name in ADAPTERS:
        model = fresh(pico_base, ADAPTERS[name])
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f".{mark}" in n for n in trainable for mark in [MARKS.get(name, "lora_")])
    # LoReFT: R and W of 2 x 64 numbers and b of 2 at each of two layers
    assert sum(int(p.numel()) for p in published_state(fresh(pico_base, ADAPTERS["loreft"])).values()) == 2 * (
        128 + 128 + 2
    )


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def configure(folder: Path, **values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "matches nothing": (
        lambda f: rewrite(f, lambda s: {f"x.{k}": v for k, v in s.items()}),
        "0 of 28 adapter tensors match",
    ),
    "half missing": (lambda f: rewrite(f, lambda s: dict(list(s.items())[::2])), "missing in the adapter"),
    "one too many": (lambda f: rewrite(f, lambda s: {**s, "extra": torch.ones(1)}), "no such place"),
    "wrong shape": (lambda f: rewrite(f, lambda s: {k: v[:1].clone() for k, v in s.items()}), "the model wants"),
    "not a number": (lambda f: rewrite(f, lambda s: {k: v * float("nan") for k, v in s.items()}), "not finite"),
    "unknown kind": (lambda f: configure(f, peft_type="FOO"), "unknown kind"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), "is torn"),
    "no config": (lambda f: (f / CONFIG).unlink(), "is no adapter"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickle weights are refused"),
}


@pytest.fixture(scope="module")
def adapter_folder(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    publish(trained(pico_base, "qlora"), folder)
    return folder


@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_adapter_is_refused(pico_base: Path, adapter_folder: Path, tmp_path: Path, name: str) -> None:
    """PEFT itself loads an adapter that matches nothing, or half of one, or one of NaNs, without a word."""
    shutil.copytree(adapter_folder, tmp_path / "adapter")
    change, said = HARMS[name]
    change(tmp_path / "adapter")
    with pytest.raises(BadModel) as caught:
        attach(load_model(pico_base), tmp_path / "adapter")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"), [({"layers": [0, 2]}, "expected 0 to 1"), ({"rank": 65}, "at most the hidden size")]
)
def test_edits_that_do_not_fit_the_model_are_refused(pico_base: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        fresh(pico_base, ReftAdapter.model_validate({**LOREFT, **changes}))


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("nothing", {}, "no such method"),
        ("IA3", {"ranks": 3}, "no configuration of this method"),
        ("PREFIX_TUNING", {"num_virtual_tokens": 2}, "cannot train"),
        ("OFT", {"target_modules": ["nowhere"]}, "does not fit this model"),
    ],
)
def test_methods_that_peft_does_not_have_are_refused(
    pico_base: Path, method: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadModel, match=said):
        fresh(pico_base, PeftAdapter(name="peft", method=method, config=config))
