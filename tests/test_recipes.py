"""Every shipped recipe runs, on pico models and few rows. The quickstart is run by tests/flows/test_retrain.py."""

from __future__ import annotations

import json
from pathlib import Path

from flows.params_file import change_params
from tests.conftest import ROOT, dvc, temper
from tests.samples import pretrain_params


def test_every_recipe_is_run_somewhere() -> None:
    assert {path.name for path in (ROOT / "recipes").glob("*.yaml")} == {
        "quickstart.yaml",
        "belle.yaml",
        "pretrain-tiny.yaml",
    }


def test_belle_on_real_chats(workspace: Path, real_data: Path) -> None:
    rows = json.loads((real_data / "belle_chat_1k" / "test.json").read_text())[:60]
    (workspace / "some chats.json").write_text(json.dumps(rows, ensure_ascii=False))
    settings = [
        "ingest.sources.belle.path=some chats.json",
        "validate.max_quarantined=0.1",
        "render.max_tokens=96",
        "merge.max_mean_kl=0.5",
        "merge.probe_rows=2",
        "evaluate.max_new_tokens=4",
        "train.reft.adapter.rank=2",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    said = temper(workspace, "run", "--recipe", "recipes/belle.yaml", *words).stdout
    assert "models:/temper-belle@champion" in said
    read = json.loads((workspace / "data/raw/belle/manifest.json").read_text())
    assert read["rows"]["chat"] == 60
    assert read["licence"] == "GPL-3.0-only"


def test_a_base_is_pretrained_by_the_recipe_of_the_shipped_one(workspace: Path) -> None:
    small = pretrain_params(kind="pretrain").model_dump(exclude={"kind", "path"})
    settings = [f"base.{key}={value}" for key, value in small.items()]
    settings += ["ingest.sources.documents.count=200", "ingest.sources.talk.count=100"]
    change_params(workspace, workspace / "recipes" / "pretrain-tiny.yaml", settings)
    dvc(workspace, "repro", "base")
    config = json.loads((workspace / "data/base/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (small["hidden_size"], small["layers"])
    card = (workspace / "data/base/README.md").read_text()
    for what in ("tokens seen | 640 in 5 steps", "loss", "seed | 1"):
        assert what in card
