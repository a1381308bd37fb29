"""`temper estimate`, by its function and by its real command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.cli import console
from flows.files.estimate import advice, estimates
from tasks.base.params import ContinueBase
from tasks.core.errors import BadModel, BadParams
from tests.conftest import temper
from tests.helpers.samples import ADALORA, LORA, SFT, method, pretrain_params

GIB = 2**30


def test_every_method_is_estimated_before_anything_has_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(temper(workspace, "estimate", "--json").stdout)
    assert list(found["methods"]) == ["qlora", "orpo", "reft"]
    assert "all of 192 tokens" in found["rows"]
    for estimated in found["methods"].values():
        assert set(estimated["dtypes"]) == {"bfloat16", "float32"}
        assert estimated["suggestions"] == []
        for each in estimated["dtypes"].values():
            assert each["fits"]
            assert max(each[kind] for kind in ("weights", "activations", "logits")) < each["total"]
            assert each["steps"] is None
            assert each["step_s"] > 0
    console.estimation(found)
    printed = capsys.readouterr().out
    assert printed.count("yes, ") == 6
    assert "for a step" in printed


def test_rendered_rows_say_how_long_rows_are_and_how_many_steps_there_are(factory: Path) -> None:
    found = estimates(factory, None, "reft")
    (figures, _) = found["methods"]["reft"]["dtypes"].values()
    summary = json.loads((factory / "data" / "adapters" / "reft" / "summary.json").read_text())
    assert found["rows"] == str(factory / "data" / "rendered")
    assert figures["steps"] == summary["steps"]
    assert figures["trained"] == summary["trainable_parameters"]


def test_what_does_not_fit_is_said_with_what_would(workspace: Path, tmp_path: Path) -> None:
    """Two layers of a size that no machine has memory for."""
    config = {
        "model_type": "llama",
        "hidden_size": 131072,
        "intermediate_size": 131072 * 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "vocab_size": 128256,
    }
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(config))
    done = temper(workspace, "estimate", "--model", str(path), "--method", "qlora")
    assert "NO, " in done.stdout
    assert " short" in done.stdout
    assert "qlora would fit with a machine with " in done.stdout


def test_a_card_that_is_not_here_has_its_own_memory_and_speed(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As large as here, and faster as the data sheets say: bound by neither alone, so between their two ratios."""
    here = estimates(workspace, None, "reft")["methods"]["reft"]["dtypes"]
    cards = {name: estimates(workspace, None, "reft", name) for name in ("H100", "a100", "t4")}
    for found in cards.values():
        for dtype, each in found["methods"]["reft"]["dtypes"].items():
            assert each["total"] == here[{"float16": "bfloat16"}.get(dtype, dtype)]["total"]
            room = found["machine"]["free_bytes"] - found["machine"]["process_bytes"]
            assert each["left_bytes"] == room - each["total"]
    step = {name: cards[name]["methods"]["reft"]["dtypes"]["bfloat16"]["step_s"] for name in ("H100", "a100")}
    assert 3350 / 2039 < step["a100"] / step["H100"] < 989.4 / 312
    assert [found["machine"]["dtype"] for found in cards.values()] == ["bfloat16", "bfloat16", "float16"]
    console.estimation(cards["t4"])
    assert re.search(r"machine: Tesla T4, trains in float16, 15.0 GiB free, .*\n +an estimate", capsys.readouterr().out)
    with pytest.raises(BadParams, match=r"is no card that is known(.|\n)*h100"):
        estimates(workspace, None, None, "cyrix")


def changed(workspace: Path, section: str, name: str, value: Any) -> None:
    path = workspace / "params.yaml"
    yaml = YAML()
    params = yaml.load(path)
    (params[section] if section else params)[name] = value
    yaml.dump(params, path)


def test_a_method_that_cannot_be_estimated_says_why_and_stops_no_other(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    misfit = method({**LORA, "targets": ["c_attn"]}, SFT).model_dump()
    changed(workspace, "train", "misfit", misfit)
    found = json.loads(temper(workspace, "estimate", "--json").stdout)
    assert list(found["methods"]) == ["qlora", "orpo", "reft", "misfit"]
    assert "the adapter does not fit this model" in found["methods"]["misfit"]["problem"]
    assert found["methods"]["misfit"]["dtypes"] == {}
    assert all(found["methods"][name]["problem"] is None for name in ("qlora", "orpo", "reft"))
    console.estimation(found)
    printed = capsys.readouterr().out
    assert "misfit cannot be estimated: params: the adapter does not fit this model" in printed
    assert printed.count("yes, ") == 6
    done = temper(workspace, "estimate", "--method", "misfit", code=65)
    assert "the adapter does not fit this model" in done.stderr


def test_adalora_is_estimated_before_rows_are_rendered(workspace: Path) -> None:
    adalora = method({**ADALORA, "warmup_steps": 10, "final_steps": 10}, SFT).model_dump()
    changed(workspace, "train", "adalora", adalora)
    (figures, _) = estimates(workspace, None, "adalora")["methods"]["adalora"]["dtypes"].values()
    assert figures["total"] > 0
    assert figures["steps"] is None


def test_the_shape_of_a_base_that_is_trained_further_is_that_of_the_model_it_begins_with(
    workspace: Path, pico_base: Path
) -> None:
    of = {"kind": "local", "path": str(pico_base), "sha256": "0" * 64, "template": "own"}
    kept = {key: value for key, value in pretrain_params().model_dump().items() if key in ContinueBase.model_fields}
    nothing = {"tokens": [], "merges": 0, "begin_as": "pieces"}
    base = {**kept, "kind": "continue", "of": of, "growth": nothing, "adapter": {"name": "full"}}
    direct = estimates(workspace, None, "reft")["methods"]["reft"]["dtypes"]["float32"]["total"]
    changed(workspace, "", "base", base)
    found = estimates(workspace, None, "reft")
    assert found["model"] == str(pico_base)
    assert found["methods"]["reft"]["dtypes"]["float32"]["total"] == direct


def test_a_base_that_is_not_there_yet_is_told_by_how_it_comes_to_be(workspace: Path) -> None:
    checkpoint = {
        "kind": "checkpoint",
        "path": "data/mine",
        "weights": "w.pt",
        "tokenizer": "t.json",
        "heads": 2,
        "kv_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rotation": "half_split",
        "context_tokens": 32,
        "stop_token": "<s>",
        "template": "own",
    }
    for base, said in ((checkpoint, "imported"), (pretrain_params().model_dump(), "pretrained")):
        changed(workspace, "", "base", base)
        with pytest.raises(BadModel, match=f"the base has not been {said} yet"):
            estimates(workspace, None, None)


def test_bad_input_is_one_error_and_exit_65(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="no such method"):
        estimates(workspace, None, "lora")
    with pytest.raises(BadModel, match=r"no config\.json"):
        estimates(workspace, tmp_path, None)
    done = temper(workspace, "estimate", "--model", str(tmp_path / "none"), code=65)
    assert "there is no config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_advice_after_memory_ran_out_is_the_estimate_with_what_fits(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.train.estimate import estimate

    assert advice(workspace, "reft").count(": a step of reft needs ") == 1  # and nothing else, as it fits
    machine = estimate.Machine("cpu", 100 << 20, 100 << 20)
    monkeypatch.setattr(
        estimate, "this_machine", lambda device: machine._replace(free_bytes=machine.free_bytes + 2**20)
    )
    said = advice(workspace, "reft").splitlines()
    assert said[0].endswith("; 0.00 GiB (1048576 bytes) are free now")
    assert [line.split(": ")[0].strip() for line in said] == ["estimate", *["fits"] * (len(said) - 1)]
    assert "fits:     a machine with 8 GiB of memory free, which needs " in said[-1]
    assert "there is no such method" in advice(workspace, "nothing")
