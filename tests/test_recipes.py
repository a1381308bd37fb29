"""Every shipped recipe runs, on pico models and few rows. The quickstart is run by tests/flows/test_retrain.py."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from flows.params_file import change_params
from tests.conftest import ROOT, dvc, temper
from tests.encoder_decoders import make_base
from tests.samples import pretrain_params

TWEETS = Path("fms_artifacts", "testdata")


def test_every_recipe_is_run_somewhere() -> None:
    assert {path.name for path in (ROOT / "recipes").glob("*.yaml")} == {
        "quickstart.yaml",
        "belle.yaml",
        "lora-mt0-twitter.yaml",
        "pretrain-tiny.yaml",
        "scratch-llama.yaml",
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


def test_labels_are_generated_for_real_tweets_by_an_encoder_decoder(workspace: Path, real_data: Path) -> None:
    """RAFT's twitter_complaints whole, with the columns of RAFT; an mT5 of another size stands in for mt0-large."""
    found = json.loads((real_data / TWEETS / "json" / "twitter_complaints_input_output.json").read_text())
    rows = [{"Tweet text": row["input"], "text_label": row["output"], "ID": row["ID"]} for row in found]
    assert len(rows) == 50
    (workspace / "some tweets.json").write_text(json.dumps(rows))
    make_base(workspace / "models" / "pico", "mt5", [text for row in rows for text in list(row.values())[:2]])
    settings = [
        "ingest.sources.twitter.path=some tweets.json",
        "base={kind: local, path: models/pico, template: own}",
        "train.lora.checkpoint_every_steps=4",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    said = temper(workspace, "run", "--recipe", "recipes/lora-mt0-twitter.yaml", *words).stdout
    assert "models:/temper-twitter@champion" in said
    assert "the champion on a held-out row (expected: " in said
    assert json.loads((workspace / "data/raw/twitter/manifest.json").read_text())["rows"]["pair"] == 50
    config = json.loads((workspace / "data/adapters/lora/adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["target_modules"]) == ("SEQ_2_SEQ_LM", 8, ["q", "v"])
    base, tuned = (
        json.loads((workspace / f"data/reports/{name}/metrics.json").read_text()) for name in ("base", "lora")
    )
    assert tuned["loss"] < base["loss"]
    labels = tuned["labels"]
    assert set(labels["by_label"]) == {"complaint", "no complaint"}
    assert sum(label["rows"] for label in labels["by_label"].values()) == tuned["rows"]
    assert labels["accuracy"] == tuned["exact_match"]
    equivalence = json.loads((workspace / "data/models/lora/equivalence.json").read_text())
    assert equivalence["form"] == "merged onto the original weights"
    _check_served(workspace, rows[0]["Tweet text"])


def _check_served(workspace: Path, text: str) -> None:
    """A request to the registered model, a folder asked directly, and the command line say the same."""
    import mlflow

    from flows.ask import ask
    from tasks.tracking import connect

    connect(workspace)
    about = mlflow.models.get_model_info("models:/temper-twitter@champion")
    assert about.signature.inputs.input_names() == ["input", "max_tokens"]
    assert about.signature.outputs.input_names() == ["output", "finish_reason", "usage"]
    loaded = mlflow.pyfunc.load_model("models:/temper-twitter@champion")
    (one, two) = loaded.predict([{"input": text, "max_tokens": 4}, {"input": "thanks", "max_tokens": 4}])
    assert one["finish_reason"] in ("stop", "length")
    assert one["usage"]["completion_tokens"] <= 4
    assert ask(workspace, str(workspace / "data/models/lora"), [("user", text)], 4) == one["output"]
    assert ask(workspace, "models:/temper-twitter@champion", [("user", "thanks")], 4) == two["output"]
    assert temper(workspace, "chat", text, "--max-tokens", "4").stdout.strip().endswith(one["output"])


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


def test_ones_own_llama_from_plain_texts_to_a_champion(workspace: Path) -> None:
    """Only sizes are changed: the corpus and the instructions are files of the names that the recipe has."""
    words = ["red", "blue", "green", "small", "big", "old", "new", "round", "flat", "warm"]
    texts = [
        f"The {a} thing is {b}, and the {c} thing is {d}." for a, b, c, d in product(words[:5], words, words, words[5:])
    ]
    rows = [
        {"instruction": f"What is the {a} {b} thing?", "input": "", "output": f"It is {a} and {b}."}
        for a, b in product(words, words)
        if a != b
    ]
    (workspace / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::7]))
    (workspace / "instructions.json").write_text(json.dumps(rows))
    settings = [
        "base.vocabulary=400",
        "base.hidden_size=64",
        "base.mlp_size=64",
        "base.layers=2",
        "base.heads=4",
        "base.kv_heads=1",
        "base.context_tokens=64",
        "base.batch_tokens=512",
        "base.tokens=10240",
        "base.checkpoint_every_steps=10",
        "base.warmup_steps=2",
        "train.lora.adapter.rank=4",
        "train.lora.epochs=1",
        "merge.probe_rows=2",
        "evaluate.max_new_tokens=4",
    ]
    given = [word for setting in settings for word in ("--set", setting)]
    said = temper(workspace, "run", "--recipe", "recipes/scratch-llama.yaml", *given).stdout
    assert "models:/temper-scratch@champion" in said
    made = json.loads((workspace / "data/base/manifest.json").read_text())
    held_out = made["held_out"]
    assert held_out["perplexity"] < 200  # of 400 for a model that knows nothing
    assert f"{held_out['loss']:.4f} nats per token" in (workspace / "data/base/README.md").read_text()
    config = json.loads((workspace / "data/base/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 1)
    report = json.loads((workspace / "data/reports/lora/metrics.json").read_text())
    assert report
