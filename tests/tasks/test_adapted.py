from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapted import CONFIG, WEIGHTS, Adapter, attach, fresh, load_adapted, publish, published_state
from tasks.errors import BadModel
from tasks.models import Model, load_model
from tasks.params import LoreftAdapter, QloraAdapter
from tests.samples import LOREFT, QLORA

ADAPTERS: dict[str, Adapter] = {
    "qlora": QloraAdapter.model_validate(QLORA),
    "loreft": LoreftAdapter.model_validate(LOREFT),
}


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    return result


def trained(base: Path, name: str) -> Model:
    """An adapter with numbers in it, as a training would leave them."""
    torch.manual_seed(0)
    model = fresh(base, ADAPTERS[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "parametrizations" not in parameter_name:
                parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_elsewhere_it_is_the_same_model_bit_for_bit(
    pico_base: Path, tmp_path: Path, name: str
) -> None:
    model = trained(pico_base, name)
    publish(model, ADAPTERS[name], tmp_path)
    again = load_adapted(pico_base, tmp_path, ADAPTERS[name])
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load_model(pico_base)))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_published_form_is_the_same_twice(pico_base: Path, tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        publish(trained(pico_base, name), ADAPTERS[name], tmp_path / folder)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_lora_adapter_loads_in_peft_itself(pico_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained(pico_base, "qlora")
    publish(model, ADAPTERS["qlora"], tmp_path)
    theirs = PeftModel.from_pretrained(load_model(pico_base, QloraAdapter.model_validate(QLORA)), tmp_path)
    assert torch.equal(logits(theirs), logits(model))


def test_only_the_adapter_is_trained(pico_base: Path) -> None:
    for name in ADAPTERS:
        model = fresh(pico_base, ADAPTERS[name])
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all("lora_" in n or n.startswith("reft.") for n in trainable)
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
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), "not a readable adapter"),
    "no config": (lambda f: (f / CONFIG).unlink(), "not a readable adapter"),
    "pickled": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "not a readable adapter"),
}


@pytest.fixture(scope="module")
def adapter_folder(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    publish(trained(pico_base, "qlora"), ADAPTERS["qlora"], folder)
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
    ("changes", "said"), [({"layers": [0, 2]}, "no such layer"), ({"rank": 65}, "exceeds the hidden size")]
)
def test_edits_that_do_not_fit_the_model_are_refused(pico_base: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadModel, match=said):
        fresh(pico_base, LoreftAdapter.model_validate({**LOREFT, **changes}))
