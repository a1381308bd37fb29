"""One architecture for each way in which models differ; docs/architectures.md has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.architectures.check import check_model
from bench.architectures.small_models import save_small_model
from tasks.adapters.attach import init_adapter
from tasks.adapters.params import LoraAdapter
from tasks.core.errors import BadModel

WAYS = {
    "llama": "joined",
    "gemma3": "joined",  # its text part is nested
    "llama4": "padded",  # get_decoder gives the whole model
    "modernbert-decoder": "joined",  # get_decoder gives the head
    "falcon_h1": "padded",  # the head's factor is the decoder's
    "falcon": "padded",  # its linear layers are of its own kind
    "mamba": "padded",  # its kernel passes over a layer's module
    "roberta": "padded",  # counts positions by padding
    "nemotron": "padded",  # its attention takes no layout
    "zamba": "padded",  # two layers hold the same weights
    "laguna": "joined",  # names of its experts are changed for files
    "hrm_text": "joined",  # in files several projections are one tensor
    "bigbird_pegasus": "padded",  # says that its head is its embedding, and it is not
    "afmoe": "joined",  # wants what attention gives in its own layout
}


@pytest.mark.parametrize("name", WAYS)
def test_a_model_is_trained_reloaded_and_merged_as_its_own_code_computes_it(name: str, tmp_path: Path) -> None:
    save_small_model(name, tmp_path / "base")
    way, lora, reft, _ = check_model(tmp_path / "base", tmp_path)
    assert (way, lora, reft) == (WAYS[name], "", "")


@pytest.mark.parametrize("name", ["llava", "mistral3", "mllama"])
def test_of_a_model_that_sees_images_the_text_part_learns(name: str, tmp_path: Path) -> None:
    save_small_model(name, tmp_path / "base", sees=True)
    _, lora, reft, _ = check_model(tmp_path / "base", tmp_path)
    assert (lora, reft) == ("", "")
    adapted = init_adapter(tmp_path / "base", LoraAdapter(name="lora", rank=2))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained
    assert not [name for name in trained if "vision" in name or "projector" in name]


@pytest.mark.parametrize(
    ("name", "sees", "lora", "reft"),
    [
        ("cpmant", False, "looks ahead", "looks ahead"),
        ("prophetnet", False, "looks ahead", "looks ahead"),
        ("blip", True, "missing 1 required positional argument: 'pixel_values'", "pixel_values"),
        ("reformer", False, "does not depend on what is trained", "does not depend on what is trained"),
        ("gemma3n_text", False, "", "do not give each token one hidden state"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(name: str, sees: bool, lora: str, reft: str, tmp_path: Path) -> None:
    save_small_model(name, tmp_path / "base", sees=sees)
    outcome = check_model(tmp_path / "base", tmp_path)
    assert (lora in outcome.lora) if lora else not outcome.lora
    assert (reft in outcome.reft) if reft else not outcome.reft


def test_a_model_of_berts_kind_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    save_small_model("bert", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"is_decoder": true', '"is_decoder": false'))
    assert "looks ahead" in check_model(tmp_path / "base", tmp_path).lora


def test_weights_that_two_modules_hold_get_no_two_updates(tmp_path: Path) -> None:
    save_small_model("zamba", tmp_path / "base")
    with pytest.raises(BadModel, match=r"more than one module holds these weights(.|\n)*shared_transf"):
        init_adapter(tmp_path / "base", LoraAdapter(name="lora", rank=2, targets=["q_proj"]))
