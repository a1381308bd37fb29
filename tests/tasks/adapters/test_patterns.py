from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.adapters.attach import attach, make_trainable, save_adapter
from tasks.adapters.files import CONFIG
from tasks.adapters.params import FullAdapter, LoraAdapter
from tasks.adapters.patterns import check_patterns
from tasks.core.errors import BadModel
from tasks.deltas.weight_deltas import changes_of
from tasks.models.loader import load_model
from tasks.models.safetensors_reader import stored_in

NAMES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(8) for name in "qkvo"]
HOSTILE = [r"(\w+\.?)+!", r"([a-z_.0-9]*)*!", r"(.*)*\d{9}!", r"(\w|\w\w|\.)*!", r"(.*.*.*)*!"]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize(
    "config",
    [
        lambda pattern: {"target_modules": pattern},
        lambda pattern: {"rank_pattern": {"k_proj": 2, pattern: 4}},
        lambda pattern: {"layers_pattern": ["layers", pattern]},
        lambda pattern: {"exclude_modules": {pattern}},
    ],
    ids=["targets", "ranks", "layers", "excluded"],
)
def test_a_pattern_without_end_is_refused_by_name(config: Any, pattern: str, small_limits: None) -> None:
    with pytest.raises(BadModel, match="cannot be matched") as caught:
        check_patterns(config(pattern), NAMES, "here")
    assert caught.value.exit_code == 65
    assert repr(pattern) in str(caught.value)
    assert "does not come to an end" in str(caught.value)
    assert len(caught.value.examples) == 1


def test_usual_patterns_are_matched(small_limits: None) -> None:
    usual = [
        r".*\.(q|k|v)_proj",
        r"model\.layers\.([0-9]|1[0-5])\..*",
        "k_proj",
        r".*self_attn.*(_proj|_norm)$",
        "(",
        "a{2,1}",
    ]
    check_patterns({"target_modules": usual[0], "rank_pattern": dict.fromkeys(usual, 1), "r": 8, "x": None}, NAMES, "")


@pytest.fixture
def adapter(pico_base: Path, tmp_path: Path) -> Path:
    model = make_trainable(load_model(pico_base), LoraAdapter(name="lora", rank=2, alpha=4, targets=["q_proj"]))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapter_with_such_a_pattern_is_neither_attached_nor_merged(
    adapter: Path, pico_base: Path, tmp_path: Path, key: str, small_limits: None
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    config[key] = HOSTILE[0] if key == "target_modules" else {HOSTILE[0]: 2}
    hostile = tmp_path / "hostile"
    shutil.copytree(adapter, hostile)
    (hostile / CONFIG).write_text(json.dumps(config))
    for use in (lambda: attach(load_model(pico_base), hostile), lambda: changes_of(hostile, stored_in(pico_base))):
        with pytest.raises(BadModel, match="cannot be matched") as caught:
            use()
        assert repr(HOSTILE[0]) in str(caught.value)
    attach(load_model(pico_base), adapter)


def test_patterns_of_params_are_tried_as_well(pico_base: Path, small_limits: None) -> None:
    with pytest.raises(BadModel, match="cannot be matched"):
        make_trainable(load_model(pico_base), FullAdapter(name="full", modules=HOSTILE[1]))
