"""Every shipped recipe runs, on pico models and few rows. The quickstart is run by tests/flows/test_retrain.py."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from flows.run.edit_params import change_params
from tests.conftest import ROOT, dvc, run_stages, temper
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import pretrain_params

TWEETS = Path("fms_artifacts", "testdata")


def test_every_recipe_is_run_somewhere() -> None:
    assert {path.name for path in (ROOT / "recipes").glob("*.yaml")} == {
        "quickstart.yaml",
        "belle.yaml",
        "belle-baichuan-lora.yaml",
        "lora-mt0-twitter.yaml",
        "orpo-llama3.yaml",
        "pretrain-tiny.yaml",
        "reft-commonsense.yaml",
        "reft-llama3.yaml",
        "scratch-llama.yaml",
    }


SMALL = (
    "merge.max_mean_kl=0.5",
    "merge.probe_examples=2",
    "evaluate.rows=8",
    "evaluate.batch_size=8",
    "evaluate.max_new_tokens=4",
)
"""For models that know nothing: what is compared is little, and what they say is cut short."""


def metrics(workspace: Path, method: str) -> Any:
    return json.loads((workspace / "data" / "reports" / method / "metrics.json").read_text())


def adapter_config(workspace: Path, method: str) -> Any:
    return json.loads((workspace / "data" / "adapters" / method / "adapter_config.json").read_text())


def test_belle_on_real_chats(workspace: Path, real_data: Path) -> None:
    rows = json.loads((real_data / "belle_chat_1k" / "test.json").read_text())[:60]
    (workspace / "some chats.json").write_text(json.dumps(rows, ensure_ascii=False))
    settings = ("ingest.sources.belle.path=some chats.json", "render.max_tokens=96", "train.reft.adapter.rank=2")
    said = run_stages(workspace, "belle.yaml", *settings, "validate.max_quarantined=0.1", *SMALL)
    assert "register reft: models:/temper-belle/2" in said
    read = json.loads((workspace / "data/raw/belle/manifest.json").read_text())
    assert read["rows"]["chat"] == 60
    assert read["licence"] == "GPL-3.0-only"


def chat_base(pico_base: Path, folder: Path, config: Any = None) -> None:
    """The pico model, or another of its vocabulary, as its makers publish it: without a chat template."""
    shutil.copytree(pico_base, folder)
    (folder / "chat_template.jinja").unlink()
    if config:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def test_llama3_learns_to_answer_by_one_edit(workspace: Path, pico_base: Path, real_data: Path) -> None:
    """The recipe as it is, on a Llama with a layer 8; the rows are real instructions, in OpenHermes' form."""
    found = json.loads((real_data / "llama_factory" / "alpaca_en_demo.json").read_text())[:100]
    rows = [
        {"conversations": [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}]}
        for r in found
    ]
    (workspace / "openhermes2_5.json").write_text(json.dumps(rows))
    shape = LlamaConfig.from_pretrained(pico_base, max_position_embeddings=4096, num_hidden_layers=9)
    chat_base(pico_base, workspace / "models" / "pico", shape)
    settings = ["base={kind: local, path: models/pico, template: llama3}"]
    said = run_stages(workspace, "reft-llama3.yaml", *settings)
    assert torch.cuda.is_available() or "paged_adamw: there is no GPU to page from" in said
    config = adapter_config(workspace, "reft")
    assert (config["intervention"], config["r"], config["positions"]) == ("loreft", 4, "last")
    assert json.loads((workspace / "data/raw/openhermes/manifest.json").read_text())["rows"]["chat"] == 100
    assert "<|start_header_id|>assistant<|end_header_id|>" in (workspace / "data/base/chat_template.jinja").read_text()
    assert metrics(workspace, "reft")["base"]["loss"] != metrics(workspace, "reft")["loss"]
    assert "register reft: models:/temper-reft-llama3/1" in said


LORA_INSTEAD = (
    "train.orpo.adapter={name: lora, rank: 16, alpha: 32.0, dropout: 0.05, "
    "targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}"
)
"""stories260k is 172 wide within its MLPs, which 4-bit weights are read back wrongly at on some CPUs."""


@pytest.mark.parametrize("base", ["a pico Llama", "stories260k"])
def test_llama3_learns_from_real_pairs_by_orpo(workspace: Path, pico_base: Path, real_data: Path, base: str) -> None:
    shutil.copyfile(real_data / "llama_factory" / "dpo_en_demo.json", workspace / "pairs.json")
    settings = ["ingest.sources.mix.path=pairs.json", "base={kind: local, path: models/pico, template: chatml}"]
    if base == "stories260k":
        shutil.copytree(real_data / "stories260k" / "hf", workspace / "models" / "pico")
        settings += ["render.max_tokens=480", "evaluate.max_new_tokens=16", LORA_INSTEAD]
    else:
        shape = LlamaConfig.from_pretrained(pico_base, max_position_embeddings=4096)
        chat_base(pico_base, workspace / "models" / "pico", shape)
        settings += ["render.max_tokens=2048", "ingest.sources.mix.take={first: 100}"]  # its tokenizer has few words
    settings += ["render.held_out=0.1"]  # of so few rows
    said = run_stages(workspace, "orpo-llama3.yaml", *settings)
    assert torch.cuda.is_available() or "paged_adamw_8bit: there is no GPU to page from" in said
    config = adapter_config(workspace, "orpo")
    assert (config["r"], len(config["target_modules"])) == (16, 7)
    log = [json.loads(line) for line in (workspace / "data/adapters/orpo/log.jsonl").read_text().splitlines()]
    assert {"odds_penalty", "log_odds_ratio", "reward_chosen", "accuracy"} <= log[0].keys()
    assert [row["step"] for row in log if "held_out_loss" in row][-1] == len(log)
    told = metrics(workspace, "orpo")
    assert told["rows"] > 2  # chosen replies: there are no chats
    assert told["loss"] != told["base"]["loss"]
    assert "register orpo: models:/temper-orpo-llama3/1" in said


def test_the_reft_papers_commonsense_questions(workspace: Path, pico_base: Path, real_data: Path) -> None:
    rows = json.loads((real_data / "llm_adapters" / "ARC-Challenge" / "test.json").read_text())[:80]
    (workspace / "commonsense_170k.json").write_text(json.dumps(rows))
    shape = LlamaConfig.from_pretrained(pico_base, max_position_embeddings=1024)
    chat_base(pico_base, workspace / "models" / "pico", shape)
    settings = [
        "base={kind: local, path: models/pico, template: plain}",
        "render.held_out=0.1",  # of 80 rows; of 170,000 the recipe holds out a two-hundredth
    ]
    said = run_stages(workspace, "reft-commonsense.yaml", *settings)
    config = adapter_config(workspace, "reft")
    assert (config["r"], config["positions"], config["share_weights"]) == (8, "f7+l7", True)
    assert "register reft: models:/temper-reft-commonsense/1" in said
    # one edit for both spans of each of two layers: R and W of 8 x 64 numbers, b of 8
    assert json.loads((workspace / "data/adapters/reft/summary.json").read_text())["trainable_parameters"] >= 2 * 1032


def test_baichuan_learns_chats_and_maths_by_its_fused_projection(
    workspace: Path, pico_base: Path, real_data: Path
) -> None:
    from tasks.tokenization.baichuan import BaichuanConfig, make_known

    make_known()
    chats = json.loads((real_data / "belle_chat_1k" / "test.json").read_text())[:40]
    (workspace / "belle_chat_1k.json").write_text(json.dumps(chats, ensure_ascii=False))
    lines = (real_data / "belle_eval" / "dev1K.json").read_text().splitlines()[:40]
    (workspace / "school_math.json").write_text("\n".join(lines))
    shape = LlamaConfig.from_pretrained(pico_base).to_dict()
    own = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")
    sizes = {name: shape[name] for name in own} | {"max_position_embeddings": 1024}
    chat_base(pico_base, workspace / "models" / "pico", BaichuanConfig(**sizes))
    settings = [
        "base.path=models/pico",
        "evaluate.max_new_tokens=4",  # two hundred would be chance
    ]
    said = run_stages(workspace, "belle-baichuan-lora.yaml", *settings)
    config = adapter_config(workspace, "lora")
    assert (config["r"], config["target_modules"]) == (1, ["W_pack"])
    names = load_file(workspace / "data/adapters/lora/adapter_model.safetensors")
    assert {name.split(".")[-4] for name in names} == {"self_attn"}
    assert "register lora: models:/temper-belle-baichuan/1" in said


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
    said = run_stages(workspace, "lora-mt0-twitter.yaml", *settings)
    assert "register lora: models:/temper-twitter/1" in said
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

    from flows.chat.ask import ask
    from tasks.registry.client import connect

    connect(workspace)
    about = mlflow.models.get_model_info("models:/temper-twitter/1")
    assert about.signature.inputs.input_names()[:2] == ["input", "max_tokens"]
    assert about.signature.outputs.input_names() == ["output", "finish_reason", "usage"]
    loaded = mlflow.pyfunc.load_model("models:/temper-twitter/1")
    (one, two) = loaded.predict([{"input": text, "max_tokens": 4}, {"input": "thanks", "max_tokens": 4}])
    assert one["finish_reason"] in ("stop", "length")
    assert one["usage"]["completion_tokens"] <= 4
    assert ask(workspace, str(workspace / "data/models/lora"), [("user", text)], 4) == one["output"]
    assert ask(workspace, "models:/temper-twitter/1", [("user", "thanks")], 4) == two["output"]
    assert (
        temper(workspace, "chat", text, "--model", "models:/temper-twitter/1", "--max-tokens", "4")
        .stdout.strip()
        .endswith(one["output"])
    )


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
        "merge.probe_examples=2",
        "evaluate.max_new_tokens=4",
    ]
    said = run_stages(workspace, "scratch-llama.yaml", *settings)
    assert "register lora: models:/temper-scratch/1" in said
    made = json.loads((workspace / "data/base/manifest.json").read_text())
    held_out = made["held_out"]
    assert held_out["perplexity"] < 200  # of 400 for a model that knows nothing
    assert f"{held_out['loss']:.4f} nats per token" in (workspace / "data/base/README.md").read_text()
    config = json.loads((workspace / "data/base/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 1)
    report = json.loads((workspace / "data/reports/lora/metrics.json").read_text())
    assert report
