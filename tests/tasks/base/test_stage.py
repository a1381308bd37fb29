from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from tasks.base.corpus import pack_blocks
from tasks.base.params import HubBase
from tasks.base.pretraining import Shuffle, document, make_model, train_tokenizer
from tasks.base.stage import copy_model, give_template
from tasks.core.errors import BadData, BadModel, Transient
from tasks.core.hub import snapshot
from tasks.core.parquet import write_records
from tasks.core.records import ChatExample, Message, TextExample, held_out
from tasks.ingest.params import GeneratorSource
from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon
from tasks.models.loader import MODEL_FILES, load_model
from tasks.orchestration.params import load_params
from tasks.tokenization.chat_template import load_tokenizer, render_chat, render_prompt
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.samples import pretrain_params
from tests.tasks.base.test_continued_pretraining import params as continue_params
from tests.tasks.base.test_pretraining import texts
from tests.tasks.base.test_torch_checkpoint import original, save
from tests.tasks.base.test_torch_checkpoint import params as checkpoint_params

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    lexicon = read_lexicon(ROOT / "data" / "lexicon.yaml")
    write_records(folder, [r for rows in ("text", "talk") for r in generate_rows(Recipe("s", rows, 60, 1), lexicon)])
    return folder


def test_pretraining_learns_and_gives_the_same_model_twice(clean: Path, tmp_path: Path) -> None:
    params = pretrain_params(path=str(clean), tokens=128 * 40)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_model(params, tmp_path / name, tmp_path / f"checkpoints {name}")
    for file in ("model.safetensors", "tokenizer.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    state = json.loads(next((tmp_path / "checkpoints one").glob("step-00000040/state.json")).read_text())
    losses = [row["loss"] for row in state["log"]]
    assert losses[0] == pytest.approx(5.99, abs=0.2)  # log 400: it knows nothing yet
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    card = (tmp_path / "one" / "README.md").read_text()
    assert "5,120 in 40 steps of 128" in card


def test_the_model_it_makes_is_one_that_the_factory_takes(clean: Path, tmp_path: Path) -> None:
    params = pretrain_params(path=str(clean))
    make_model(params, tmp_path, tmp_path / "checkpoints")
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    assert model.config.vocab_size == len(tokenizer) <= 400
    assert next(iter(model.state_dict().values())).dtype in (torch.bfloat16, torch.float32)
    assert model.config.tie_word_embeddings


def test_every_digit_is_a_token_of_its_own() -> None:
    tokenizer = train_tokenizer(["1234 1234 1234 5678 a1b2 二0二6"] * 50, 400)
    for text in ("1234", "a1234", " 12", "二0二6"):
        pieces = [str(tokenizer.decode([i])) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert all(len(piece.strip()) <= 1 for piece in pieces if any(c.isdigit() for c in piece)), pieces
        assert "".join(pieces) == text or "二" in text


def test_bytes_that_the_tokenizer_never_saw_survive() -> None:
    tokenizer = train_tokenizer(["hello"] * 20, 300)
    for text in ("你好 🙂", "é\u0301\n\t x", "\u0000\u001f"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_documents_end_with_the_stop_token_and_chats_look_as_the_template_writes_them(pico_base: Path) -> None:
    tokenizer = load_tokenizer(pico_base)
    chat = ChatExample(id="1", source="s", messages=(Message("user", "hi"), Message("assistant", "ho")))
    text = document(chat)
    assert text == tokenizer.apply_chat_template([m._asdict() for m in chat.messages], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(render_chat(tokenizer, chat.messages).ids)] == render_chat(tokenizer, chat.messages).ids
    assert document(TextExample(id="1", source="s", text="a")) == "a<|im_end|>"


def test_blocks_hold_all_text_in_order(pico_base: Path) -> None:
    tokenizer = load_tokenizer(pico_base)
    texts = [f"document {n}<|im_end|>" for n in range(30)]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    blocks = pack_blocks(rows, 16)
    flat = blocks.flatten().tolist()
    everything = [i for row in rows for i in row]
    assert flat == everything[: len(flat)]
    assert len(everything) - len(flat) < 16


def test_a_shuffle_shows_everything_once_before_anything_twice() -> None:
    place = Shuffle(7, seed=1)
    order = [place(n) for n in range(21)]
    assert all(sorted(order[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert order[:7] != order[7:14]
    assert [place(n) for n in range(21)] == order


def test_a_local_model_is_copied_without_strangers(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    (tmp_path / "base" / "evil.py").write_text("")
    (tmp_path / "out").mkdir()
    copy_model(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out" / "evil.py").exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pico_base / "model.safetensors").read_bytes()


def test_the_shipped_base_is_what_its_manifest_says_and_small_enough(tmp_path: Path) -> None:
    shipped = ROOT / "models" / "tiny"
    copy_model(shipped, tmp_path)
    assert sum(file.stat().st_size for file in shipped.iterdir()) <= 10_000_000
    manifest = json.loads((shipped / "manifest.json").read_text())
    recipe = load_params(ROOT / "recipes" / "pretrain-tiny.yaml")
    assert manifest["base"].items() <= recipe.base.model_dump().items()
    assert load_model(tmp_path).num_parameters() == 2_951_616
    shutil.copytree(shipped, tmp_path / "altered")
    with (tmp_path / "altered" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(BadData, match="was changed after it was written"):
        copy_model(tmp_path / "altered", tmp_path)


def test_no_held_out_fact_of_the_quickstart_is_in_what_the_base_was_pretrained_on() -> None:
    """The facts that the evaluation asks for, against a large part of the pretraining text, question by question."""
    recipe, quickstart = (
        load_params(ROOT / "recipes" / "pretrain-tiny.yaml"),
        load_params(ROOT / "recipes" / "quickstart.yaml"),
    )
    lexicon = read_lexicon(ROOT / "data" / "lexicon.yaml")
    sources = [s for s in recipe.ingest.sources.values() if isinstance(s, GeneratorSource)]
    assert all(source.withheld >= quickstart.render.held_out for source in sources)
    seen: set[str] = set()
    for source in sources:
        for row in generate_rows(Recipe("s", source.rows, 20_000, source.seed, source.withheld), lexicon):
            if isinstance(row, TextExample):
                seen |= set(re.findall(r"(?:Question|问题)[:：]\n(.+)\n", row.text))
            elif isinstance(row, ChatExample):
                seen |= {message.content for message in row.messages}
    assert len(seen) > 40_000
    chats = quickstart.ingest.sources["chats"]
    assert isinstance(chats, GeneratorSource)
    asked = list(generate_rows(Recipe("s", "chat", chats.count, chats.seed), lexicon))
    held = [r for r in asked if isinstance(r, ChatExample) and held_out(r.split_group(), quickstart.render.held_out)]
    tuned = {r.messages[0].content for r in asked if isinstance(r, ChatExample) and r not in held}
    assert len(held) > 300
    for row in held:
        assert row.messages[0].content not in seen
        assert row.messages[0].content not in tuned


def hub(revision: str = REVISION) -> HubBase:
    return HubBase.model_validate(
        {"kind": "hub", "path": "data/remote.md", "id": "someone/pico", "revision": revision, "template": "own"}
    )


def fetch(params: HubBase) -> Path:
    return snapshot(params.id, params.revision, MODEL_FILES, kind="model")


def test_a_hub_model_comes_from_the_local_cache_at_its_revision(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real code of the hub client, offline, over a cache laid out as it lays it out."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--someone--pico" / "snapshots" / REVISION
    shutil.copytree(pico_base, folder)
    assert fetch(hub()) == folder
    with pytest.raises(Transient, match="cannot be fetched"):
        fetch(hub("f" * 40))


def test_a_moving_revision_is_refused() -> None:
    with pytest.raises(ValueError, match="revision"):
        hub("main")


def test_a_real_pretrained_model_is_a_base(real_data: Path, tmp_path: Path) -> None:
    """Stories260K has no chat template, so it can be copied but not tuned to chat as it is: this is said."""
    copy_model(real_data / "stories260k" / "hf", tmp_path)
    assert load_model(tmp_path).num_parameters() == 260_032
    with pytest.raises(BadModel, match="no chat template"):
        load_tokenizer(tmp_path)


def run_base(workspace: Path, base: dict[str, Any], code: int) -> str:
    """The stage as DVC runs it, in a workspace whose clean rows are a few texts."""
    yaml = YAML()
    content = yaml.load(workspace / "params.yaml")
    content["base"] = base
    yaml.dump(content, workspace / "params.yaml")
    (workspace / "data" / "clean").mkdir(exist_ok=True)
    write_records(workspace / "data" / "clean", texts(60))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.base", "--out", "data/base"],
        cwd=workspace,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_stage_trains_an_existing_base_further_or_says_in_one_block_why_not(workspace: Path) -> None:
    base = continue_params(Path("models/tiny"), "data/clean", sha256="0" * 64).model_dump()
    said = run_base(workspace, base, code=65)
    (pin,) = re.findall(r"set base\.of\.sha256=([0-9a-f]{64})", said)
    base["of"]["sha256"] = pin
    said = run_base(workspace, base, code=0)
    assert "base: held-out rows: " in said
    manifest = json.loads((workspace / "data/base/manifest.json").read_text())
    assert manifest["base"] == base
    assert manifest["held_out"]["bits_per_byte"] < manifest["held_out_before"]["bits_per_byte"]
    assert {"log.jsonl", "README.md", "model.safetensors"} <= manifest["files"].keys()
    base["path"] = "models/tiny"
    assert "is not the folder of clean rows" in run_base(workspace, base, code=65)


def test_the_stage_imports_a_checkpoint_or_says_in_one_block_why_not(workspace: Path) -> None:
    save(workspace / "models" / "mine", {"model": original().state_dict()})
    base = checkpoint_params(Path("models/mine"), template="chatml").model_dump()
    assert "parameters from checkpoint models/mine" in run_base(workspace, base, code=0)
    (workspace / "models" / "mine" / "model.pt").write_bytes(b"PK")
    said = run_base(workspace, base, code=65)
    assert "error: models/mine/model.pt: is no PyTorch checkpoint, or a torn one" in said


# --- chat templates ---------------------------------------------------------------------------------------------------

NAMED = sorted(path.stem for path in (ROOT / "data" / "templates").glob("*.jinja"))
CHAT = [
    Message("system", "Be brief."),
    Message("user", "one?"),
    Message("assistant", "first"),
    Message("user", "two?"),
    Message("assistant", "second"),
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
    "<|im_start|>assistant\nfirst<|im_end|>\n"
)
LOOKS = {
    "alpaca": "Be brief.\n\n### Instruction:\none?\n\n### Response:\nfirst<|im_end|>\n\n",
    "baichuan": "Be brief.<reserved_106>one?<reserved_107>first<|im_end|>",
    "chatml": CHATML,
    "gemma": "<start_of_turn>user\nBe brief.\n\none?<end_of_turn>\n<start_of_turn>model\nfirst<end_of_turn>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nfirst<|eot_id|>",
    "mistral": "[INST] Be brief.\n\none? [/INST] first<|im_end|>",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\none?<|end|>\n<|assistant|>\nfirst<|end|>\n",
    "plain": "Be brief.\none?\nfirst<|im_end|>\n",
    "qwen": CHATML,
    "vicuna": "Be brief. USER: one? ASSISTANT: first<|im_end|>",
    "zephyr": "<|system|>\nBe brief.<|im_end|>\n<|user|>\none?<|im_end|>\n<|assistant|>\nfirst<|im_end|>\n",
}


def embeddings(layer: object) -> torch.Tensor:
    weight = getattr(layer, "weight", None)
    assert isinstance(weight, torch.Tensor)
    return weight


def test_the_templates_of_the_field_are_there() -> None:
    assert set(NAMED) == set(LOOKS)


@pytest.mark.parametrize("name", NAMED)
def test_a_base_takes_a_template_by_its_name(pico_base: Path, tmp_path: Path, name: str) -> None:
    """It looks as its family's does, the loss falls on replies and stop tokens, and the model can read what it adds."""
    folder = tmp_path / "base"
    shutil.copytree(pico_base, folder)
    (folder / "chat_template.jinja").unlink()
    before = load_model(folder)
    added = give_template(folder, ROOT / "data" / "templates" / f"{name}.jinja")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert str(tokenizer.apply_chat_template([m._asdict() for m in CHAT[:3]], tokenize=False)) == LOOKS[name]
    ids, mask, prompt_tokens = render_chat(tokenizer, CHAT)
    stop = str(tokenizer.eos_token)
    scored = str(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]))
    assert [part.strip() for part in scored.split(stop)] == ["first", "second", ""]
    assert ids[:prompt_tokens] == render_prompt(tokenizer, CHAT[:2])
    assert model.config.vocab_size == len(tokenizer)
    assert bool(added) == (name in ("baichuan", "gemma", "llama3", "phi"))
    rows, known = embeddings(model.get_input_embeddings()), embeddings(before.get_input_embeddings())
    assert torch.equal(rows[: len(known)], known)
    if added:
        torch.testing.assert_close(rows[-1].float(), known.float().mean(0), atol=1e-3, rtol=1e-2)
        assert rows.data_ptr() == embeddings(model.get_output_embeddings()).data_ptr()  # still tied
    assert model(torch.tensor([ids])).logits.shape[-1] == len(tokenizer)


def test_a_real_base_without_template_learns_to_chat_in_chatml(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    copy_model(real_data / "stories260k" / "hf", folder)
    assert give_template(folder, ROOT / "data" / "templates" / "chatml.jinja") == ["<|im_start|>", "<|im_end|>"]
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.vocab_size == len(tokenizer) == 514
    ids, mask, _ = render_chat(tokenizer, CHAT)
    scored = str(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]))
    assert scored.replace(" ", "") == "first<|im_end|>second<|im_end|>"


def test_qwens_template_knows_tools(pico_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pico_base, folder)
    give_template(folder, ROOT / "data" / "templates" / "qwen.jinja")
    tokenizer = load_tokenizer(folder)
    calling = Message("assistant", "", '[{"name": "find", "arguments": {"x": 1}}]')
    for before in ([], [Message("system", "Be brief.")]):
        chat = [*before, Message("user", "q"), calling, Message("tool", "r"), Message("assistant", "a")]
        ids, mask, _ = render_chat(tokenizer, chat, ('{"name": "find"}',))
        text = str(tokenizer.decode(ids))
        assert text.count("<|im_start|>system") == 1
        assert "<tool_response>\nr\n</tool_response>" in text
        scored = str(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]))
        assert scored.count("<|im_end|>") == 2
        assert '"name": "find"' in scored


def test_an_unknown_template_is_refused(pico_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel) as caught:
        give_template(pico_base, ROOT / "data" / "templates" / "chatlm.jinja")
    assert "chatml" in caught.value.expected
