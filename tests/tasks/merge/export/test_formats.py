"""Further forms of a merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.adapters.package import FOLDER
from tasks.core.errors import BadModel, Transient
from tasks.merge.export.formats import GGUF, MODELFILE, PUSHED, export
from tasks.merge.params import GgufExport, HubExport, SafetensorsExport
from tasks.models.loader import load_model
from tests.conftest import ROOT
from tests.helpers import hub as hubs

TINY = ROOT / "models" / "tiny"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "own"])
def test_safetensors_in_another_format_and_of_a_size(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    wanted = SafetensorsExport.model_validate({"kind": "safetensors", "dtype": dtype, "max_shard_mib": 2})
    export(TINY, wanted, out)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < (2 << 20) + 10_000 for shard in shards)
    kind = getattr(torch, "bfloat16" if dtype == "own" else dtype)
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for name, tensor in load_file(TINY / "model.safetensors").items():
        assert torch.equal(found[name], tensor.to(kind))
    model = load_model(out, full_precision=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    assert model.num_parameters() == load_model(TINY).num_parameters()


def test_gguf_with_a_modelfile(tmp_path: Path) -> None:
    export(TINY, GgufExport(kind="gguf", dtype="q8_0", ollama=True), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {GGUF, MODELFILE}
    assert (tmp_path / "out" / MODELFILE).read_text().startswith(f"FROM ./{GGUF}\n")


def test_what_is_packaged_has_no_other_form(tmp_path: Path) -> None:
    (tmp_path / "model" / FOLDER).mkdir(parents=True)
    with pytest.raises(BadModel, match="cannot be exported as gguf: its adapter is beside the weights"):
        export(tmp_path / "model", GgufExport(kind="gguf", dtype="float16", ollama=False), tmp_path / "out")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.running() as running:
        hubs.take_for_the_real_one(running, tmp_path / "home", monkeypatch)
        yield running


def test_a_push_is_noted_with_its_commit(hub: hubs.Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("README.md", "manifest.json"))
    told = export(model, HubExport(kind="hub", id="me/tiny", private=True), tmp_path / "out")
    noted = json.loads((tmp_path / "out" / PUSHED).read_text())
    commit, files = hub.repositories["me/tiny"][-1]
    assert noted == {"id": "me/tiny", "commit": commit}
    assert told == f"hub:me/tiny@{commit}"
    assert files["model.safetensors"] == (TINY / "model.safetensors").read_bytes()
    hub.fails = 503
    with pytest.raises(Transient):
        export(model, HubExport(kind="hub", id="me/tiny", private=True), tmp_path / "again")
