"""`temper merge` and `temper export` on plain folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapters.files import CONFIG, WEIGHTS
from tasks.core.artifacts import MANIFEST, read_manifest
from tests.conftest import ROOT
from tests.flows.files.test_inspect import command
from tests.tasks.deltas.test_weight_deltas import llama, perturbed, saved


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a base` and two adapters of it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("plain folders")
    saved(llama(), folder / "a base")
    for name in ("one", "two"):
        saved(perturbed(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))), folder / name)
    return folder


@pytest.fixture
def here(folders: Path, tmp_path: Path) -> Path:
    shutil.copytree(folders, tmp_path / "here")
    return tmp_path / "here"


def test_an_adapter_is_merged_into_a_plain_folder(here: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = command(here, "merge", "a base", "one", "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["form"] == "merged onto the original weights"
    read_manifest(here / "out")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "a base"), here / "one")
    want = dict(theirs.merge_and_unload().named_parameters())
    for name, tensor in load_file(here / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, want[name].data, rtol=1e-5, atol=1e-6)
    again = command(here, "merge", "a base", "one", "out")
    assert again.returncode == 65
    assert "exists already" in again.stderr


def test_several_adapters_are_combined(here: Path) -> None:
    words = ["--with", "two", "--weight", "1", "--weight", "0.5", "--method", "ties", "--density", "0.7"]
    done = command(here, "merge", "a base", "one", "out", *words)
    assert done.returncode == 0, done.stderr
    assert "2 adapters combined: ties" in done.stdout
    for words, said in ((["--method", "mean"], "no way to combine"), (["--weight", "2"], "a weight for each adapter")):
        done = command(here, "merge", "a base", "one", "other", "--with", "two", *words)
        assert done.returncode == 65
        assert said in done.stderr
    assert not (here / "other").exists()


@pytest.mark.parametrize(("option", "value"), [("--onto", "both"), ("--dtype", "int8"), ("--trained-on", "int3")])
def test_a_wish_for_what_there_is_not_is_refused(here: Path, option: str, value: str) -> None:
    done = command(here, "merge", "a base", "one", "out", option, value)
    assert done.returncode == 65
    assert f"{option}: is no choice" in done.stderr


def test_what_goes_wrong_leaves_nothing_behind(here: Path) -> None:
    tensors = load_file(here / "one" / WEIGHTS)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, here / "one" / WEIGHTS)
    save_file(
        {name: tensor * 1e38 for name, tensor in load_file(here / "two" / WEIGHTS).items()}, here / "two" / WEIGHTS
    )
    shutil.copytree(here / "one", here / "pickled")
    (here / "pickled" / WEIGHTS).rename(here / "pickled" / "adapter_model.bin")
    before = sorted(here.iterdir())
    for adapter, said in (
        ("one", "not finite; refused"),
        ("two", "not finite in F32"),
        ("pickled", "pickle weights are refused"),
    ):
        done = command(here, "merge", "a base", adapter, "out")
        assert done.returncode == 65, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(here.iterdir()) == before


def test_a_changed_file_is_refused(here: Path) -> None:
    assert command(here, "merge", "a base", "one", "out").returncode == 0
    weights = bytearray((here / "out" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "out" / "model.safetensors").write_bytes(weights)
    done = command(here, "merge", "out", "two", "more")
    assert done.returncode == 65
    assert "was changed after it was written" in done.stderr


def test_a_changed_folder_is_not_exported(here: Path) -> None:
    assert command(here, "merge", "a base", "one", "out").returncode == 0
    weights = bytearray((here / "out" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "out" / "model.safetensors").write_bytes(weights)
    done = command(here, "export", "out", "more", "--kind", "safetensors")
    assert done.returncode == 65
    assert "was changed after it was written" in done.stderr


def test_an_adapter_that_names_another_base_is_refused(here: Path) -> None:
    (here / "one" / "base.json").write_text(json.dumps({"name": None, "revision": None, "weights_sha256": "0" * 64}))
    done = command(here, "merge", "a base", "one", "out")
    assert done.returncode == 65
    assert "is an adapter for another base" in done.stderr
    assert command(here, "merge", "a base", "one", "out", "--any-base").returncode == 0


def test_a_model_folder_is_exported(here: Path) -> None:
    done = command(here, "export", str(ROOT / "models" / "tiny"), "gguf")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (here / "gguf").iterdir()} == {"model.gguf", "Modelfile", MANIFEST}
    for words, said in (
        (["--kind", "onnx"], "no form to write"),
        (["--dtype", "int3"], "no number format of this form"),
    ):
        done = command(here, "export", str(ROOT / "models" / "tiny"), "other", *words)
        assert done.returncode == 65
        assert said in done.stderr
    assert not (here / "other").exists()


def test_the_form_that_an_adapter_was_trained_on_is_taken_into_account(pico_base: Path, tmp_path: Path) -> None:
    """What temper trained says so itself; the result is measured, and a bound that it breaks refuses it."""
    from tasks.adapters.attach import init_adapter, save_adapter
    from tasks.adapters.params import QloraAdapter
    from tests.helpers.samples import QLORA

    torch.manual_seed(0)
    (tmp_path / "adapter").mkdir()
    save_adapter(perturbed(init_adapter(pico_base, QloraAdapter.model_validate(QLORA))), tmp_path / "adapter")
    (tmp_path / "adapter" / "summary.json").write_text(json.dumps({"params": {"adapter": QLORA}}))
    assert (tmp_path / "adapter" / CONFIG).is_file()
    words = ["merge", str(pico_base), "adapter", "out", "--max-mean-kl"]
    done = command(tmp_path, *words, "0.5")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "equivalence.json").read_text())
    assert told["onto"].keys() == {"original", "dequantized"}
    done = command(tmp_path, *[word.replace("out", "other") for word in words], "1e-9")
    assert done.returncode == 65
    assert "the merged model is not the model that was trained" in done.stderr
    assert not (tmp_path / "other").exists()
