"""What an adapter says of its base, and what is refused of those that are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapters.attach import attach, load_packaged, read_adapter, save_adapter
from tasks.adapters.files import BASE_FILE, CONFIG, PICKLE, WEIGHTS, Base, check_base, identify_base, said_base
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadModel
from tasks.models.loader import load_model
from tests.tasks.adapters.test_attach import logits, trained

COMMIT, OTHER = "a" * 40, "b" * 40


def published(base: Path, name: str, folder: Path) -> Path:
    """A trained adapter of a kind in its published form."""
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(trained(base, name), folder)
    return folder


def as_stage_writes(source: Path, out: Path, **about: Any) -> Path:
    """A base as the stage `base` leaves it, with a manifest."""
    with atomic_folder(out, {"base": about}) as draft:
        for file in source.iterdir():
            shutil.copyfile(file, draft / file.name)
    return out


def configure(folder: Path, **values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))


# --- which base -------------------------------------------------------------------------------------------------------


def test_a_base_is_known_by_its_manifest_or_its_weights(pico_base: Path, tmp_path: Path) -> None:
    plain = identify_base(pico_base)
    assert plain.name is plain.revision is None
    local = as_stage_writes(pico_base, tmp_path / "local", kind="local", path="models/tiny")
    assert identify_base(local) == plain
    hub = as_stage_writes(pico_base, tmp_path / "hub", kind="hub", id="owner/base", revision=COMMIT)
    assert identify_base(hub) == Base("owner/base", COMMIT, plain.weights_sha256)
    packaged = tmp_path / "packaged"
    shutil.copytree(pico_base, packaged)
    (packaged / "adapter").mkdir()
    save_file({"a": torch.ones(1)}, packaged / "adapter" / WEIGHTS)
    assert identify_base(packaged) == plain


@pytest.mark.parametrize(
    "content",
    ['{"name": "x"}', '{"files": ["a"]}', '{"files": {}, "base": "x"}', "[]", "no JSON", '{"files": {"a": 1}}'],
)
def test_a_manifest_of_another_maker_says_nothing_of_a_base(pico_base: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    (tmp_path / "base" / "manifest.json").write_text(content)
    assert identify_base(tmp_path / "base") == identify_base(pico_base)


def test_an_adapter_says_which_base_it_is_of_and_peft_reads_it(pico_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    hub = as_stage_writes(pico_base, tmp_path / "hub", kind="hub", id="owner/base", revision=COMMIT)
    folder = published(hub, "lora", tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", COMMIT)
    assert said_base(folder) == identify_base(hub)
    theirs = PeftModel.from_pretrained(load_model(pico_base), folder)
    assert torch.equal(logits(theirs), logits(attach(load_model(pico_base), folder)))  # the same weights
    local = json.loads((published(pico_base, "lora", tmp_path / "local") / CONFIG).read_text())
    assert local["base_model_name_or_path"] is local["revision"] is None


def test_other_weights_of_the_same_shape_are_another_base(pico_base: Path, tmp_path: Path) -> None:
    folder = published(pico_base, "lora", tmp_path / "adapter")
    shutil.copytree(pico_base, tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match="is an adapter for another base") as caught:
        attach(load_model(tmp_path / "other"), folder)
    for base in (pico_base, tmp_path / "other"):
        assert str(identify_base(base).weights_sha256) in str(caught.value)
    assert attach(load_model(tmp_path / "other"), folder, any_base=True)


W, V = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("said", "base", "wrong"),
    [
        (Base("o/a", COMMIT, W), Base("o/a", COMMIT, W), ""),
        (Base("o/a", COMMIT, W), Base("o/mirror", OTHER, W), ""),  # the same weights under another name
        (Base("O/A", None, None), Base("o/a", COMMIT, V), ""),
        (Base(None, None, None), Base("o/a", COMMIT, V), ""),
        (Base("o/a", COMMIT, W), Base(None, None, None), ""),
        (Base("o/a", None, None), Base("o/b", COMMIT, V), "name: the adapter is of o/a, the base is o/b"),
        (
            Base("o/a", COMMIT, None),
            Base("o/a", OTHER, V),
            f"revision: the adapter is of {COMMIT}, the base is {OTHER}",
        ),
        (Base("o/a", COMMIT, W), Base("o/a", COMMIT, V), f"weights sha256: the adapter is of {W}, the base is {V}"),
    ],
)
def test_what_both_know_must_agree(tmp_path: Path, said: Base, base: Base, wrong: str) -> None:
    (tmp_path / BASE_FILE).write_text(json.dumps(said._asdict()))
    if not wrong:
        check_base(tmp_path, base)
        return
    with pytest.raises(BadModel, match="is an adapter for another base") as caught:
        check_base(tmp_path, base)
    assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("owner/base", None, Base("owner/base", None, None)),
        ("owner/base", COMMIT, Base("owner/base", COMMIT, None)),
        ("owner/base", "main", Base("owner/base", None, None)),
        ("../models/the base", None, Base(None, None, None)),
        (None, None, Base(None, None, None)),
    ],
)
def test_adapters_of_other_makers_say_it_in_their_configuration(
    tmp_path: Path, name: str | None, revision: str | None, said: Base
) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"base_model_name_or_path": name, "revision": revision}))
    assert said_base(tmp_path) == said


def test_a_packaged_adapter_goes_with_the_base_beside_it(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "model")
    published(pico_base, "loreft", tmp_path / "model" / "adapter")
    alone = attach(load_model(pico_base), tmp_path / "model" / "adapter")
    assert torch.equal(logits(load_packaged(tmp_path / "model")), logits(alone))


# --- what is refused --------------------------------------------------------------------------------------------------


def _torn(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


HARMS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pickled": ("lora", lambda f: (f / WEIGHTS).rename(f / PICKLE), "pickle weights are refused"),
    "no weights": ("lora", lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "no config": ("lora", lambda f: (f / CONFIG).unlink(), "is no adapter"),
    "torn": ("lora", lambda f: _torn(f, -10), "is torn, or no safetensors file"),
    "torn in its header": ("lora", lambda f: _torn(f, 20), "is torn, or no safetensors file"),
    "empty": ("lora", lambda f: _torn(f, 0), "is torn, or no safetensors file"),
    "torn config": ("lora", lambda f: (f / CONFIG).write_text('{"peft_type": "LO'), "is not valid JSON"),
    "binary config": ("lora", lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "listed config": ("lora", lambda f: (f / CONFIG).write_text("[]"), "is not a JSON object"),
    "torn base": ("lora", lambda f: (f / BASE_FILE).write_text("{"), "is not valid JSON"),
    "foreign base": ("lora", lambda f: (f / BASE_FILE).write_text('{"name": 3}'), "does not say which base it is of"),
    "unknown method": ("lora", lambda f: configure(f, peft_type="FOO"), "is of an unknown kind"),
    "no method": ("lora", lambda f: configure(f, peft_type=None), "is of an unknown kind"),
    "auto map": ("lora", lambda f: configure(f, auto_map={"AutoModel": "evil.Model"}), "asks to run its own code"),
    "custom library": (
        "lora",
        lambda f: configure(f, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}),
        "got:      auto_mapping",
    ),
    "remote code within": (
        "lora",
        lambda f: configure(f, tokenizer_kwargs={"trust_remote_code": True}),
        "tokenizer_kwargs.trust_remote_code",
    ),
    "another module": (
        "lora",
        lambda f: configure(f, megatron_config={"x": 1}, megatron_core="evil"),
        "got:      megatron_config",
    ),
    "further adapters": (
        "lora",
        lambda f: configure(f, peft_type="XLORA", adapters={"a": "owner/name"}),
        "names further adapters to load",
    ),
    "layer of LoReFT": ("loreft", lambda f: configure(f, layers=[0, 7]), "expected 0 to 1"),
    "layer of a bottleneck": ("houlsby", lambda f: configure(f, layers=[7]), "expected 0 to 1"),
    "layer of LoRA": (
        "lora",
        lambda f: configure(f, layers_to_transform=[7], target_modules=["q_proj"]),
        "does not fit this model",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_an_adapter_that_cannot_be_trusted_is_refused(pico_base: Path, tmp_path: Path, name: str) -> None:
    kind, harm, said = HARMS[name]
    folder = published(pico_base, kind, tmp_path / "adapter")
    harm(folder)
    with pytest.raises(BadModel, match=said) as caught:
        attach(load_model(pico_base), folder)
    assert caught.value.exit_code == 65
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("with_base", [True, False])
def test_without_a_configuration_it_is_no_adapter_whatever_it_says_of_its_base(
    pico_base: Path, tmp_path: Path, with_base: bool
) -> None:
    if with_base:
        (tmp_path / BASE_FILE).write_text(json.dumps(identify_base(pico_base)._asdict()))
    with pytest.raises(BadModel, match="is no adapter") as caught:
        attach(load_model(pico_base), tmp_path)
    assert caught.value.got == f"no {CONFIG}"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_adapter_in_eight_bits_is_the_one_of_the_same_numbers(
    pico_base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = published(pico_base, "lora", tmp_path / "adapter")
    small = {name: tensor.to(dtype) for name, tensor in read_adapter(folder).state.items()}
    found = []
    for state in (small, {name: tensor.float() for name, tensor in small.items()}):
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        found.append(logits(attach(load_model(pico_base), folder)))
    assert torch.equal(*found)
    first = next(iter(small))
    small[first] = torch.full(small[first].shape, float("nan")).to(dtype)
    save_file(small, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BadModel, match="not finite"):
        attach(load_model(pico_base), folder)


def test_a_class_of_transformers_itself_is_no_code_of_its_own(pico_base: Path, tmp_path: Path) -> None:
    """PEFT writes `auto_mapping` into every adapter without a task type; temper never follows it."""
    folder = published(pico_base, "lora", tmp_path / "adapter")
    library = "transformers.models.llama.modeling_llama"
    configure(folder, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": library})
    assert read_adapter(folder).config.r == 2
