"""Existing models that are trained further: fully or with LoRA, with new tokens or without, tied or not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.base import continued_pretraining
from tasks.base.corpus import own_token_ids, read_corpus, text_bytes
from tasks.base.params import ContinueBase
from tasks.base.perplexity import perplexity
from tasks.base.stage import check_loads, copy_model, put
from tasks.core.errors import BadModel
from tasks.core.parquet import write_records
from tasks.core.records import ChatExample, Message
from tasks.ingest.stage import Reading
from tasks.models.loader import load_model
from tasks.tokenization.tokenizer import read_tokenizer
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import file_source, stored
from tests.tasks.base.test_pretraining import Killed, chats, clean, kill_after, texts

FULL = {"name": "full"}
LORA = {"name": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
NOTHING = {"tokens": [], "merges": 0, "begin_as": "pieces"}
GROWTH = {"tokens": ["birds", "mat"], "merges": 5, "begin_as": "pieces"}


def pin(folder: Path) -> str:
    """As `sha256sum * | sha256sum` makes it."""
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def params(base: Path, path: str, sha256: str = "", **changes: Any) -> ContinueBase:
    values: dict[str, Any] = {
        "kind": "continue",
        "path": path,
        "rows": ["text"],
        "held_out": 0.1,
        "held_out_rows": 50,
        "of": {"kind": "local", "path": str(base), "sha256": sha256 or pin(base), "template": "own"},
        "growth": NOTHING,
        "adapter": FULL,
        "context_tokens": 32,
        "tokens": 256 * 8,
        "batch_tokens": 256,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "checkpoint_every_steps": 2,
        "seed": 1,
    }
    return ContinueBase.model_validate({**values, **changes})


def made(out: Path, base: ContinueBase) -> dict[str, Any]:
    out.mkdir()
    return put(base, out, out.with_suffix(".checkpoints"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clean(tmp_path_factory.mktemp("corpus") / "clean", texts(300))


@pytest.mark.parametrize("growth", [NOTHING, GROWTH], ids=["same", "grown"])
@pytest.mark.parametrize("adapter", [FULL, LORA, {**LORA, "name": "dora"}], ids=["full", "lora", "dora"])
def test_a_model_that_is_trained_further_predicts_held_out_rows_better(
    tmp_path: Path, base: Path, corpus: str, adapter: dict[str, Any], growth: dict[str, Any]
) -> None:
    chosen = params(base, corpus, adapter=adapter, growth=growth)
    said = made(tmp_path / "out", chosen)
    trained = 0.9 if adapter is FULL or growth is GROWTH else 0.99  # embeddings of random numbers stay with LoRA
    assert said["held_out"]["bits_per_byte"] < trained * said["held_out_before"]["bits_per_byte"]
    model = check_loads(tmp_path / "out", "here", chats=True)
    before = load_model(base, full_precision=True)
    tokenizer = read_tokenizer(tmp_path / "out")
    rows = read_corpus(chosen).held_out
    found = perplexity(
        model, list(own_token_ids(tokenizer, rows)), text_bytes(rows), context_tokens=32, batch_tokens=64
    )
    assert found is not None
    assert said["held_out"]["loss"] == pytest.approx(found.loss, rel=1e-3)
    new = len(GROWTH["tokens"]) + 5 if growth is GROWTH else 0  # type: ignore[arg-type]
    assert len(said["new_tokens"]) == new
    assert model.config.vocab_size == before.config.vocab_size + new
    assert model.config.tie_word_embeddings == before.config.tie_word_embeddings
    assert stored(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.float32
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"before: {said['held_out_before']['loss']:.4f} nats per token" in card
    assert f"after: {said['held_out']['loss']:.4f} nats per token" in card
    assert f"sha256 {pin(base)}" in card
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 8 + 2
    assert log[-1] == {"held_out": said["held_out"]}


def test_lora_moves_new_rows_and_layers_and_nothing_else(tmp_path: Path, base: Path, corpus: str) -> None:
    made(tmp_path / "out", params(base, corpus, adapter=LORA, growth=GROWTH))
    was, now = (load_model(folder, full_precision=True).state_dict() for folder in (base, tmp_path / "out"))
    old = was["model.embed_tokens.weight"].shape[0]
    for name, tensor in was.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(now[name][:old], tensor)
        else:
            assert torch.equal(now[name], tensor) == ("norm" in name), name
    grown = tmp_path / "grown"
    shutil.copytree(base, grown)
    continued_pretraining.grow(
        grown,
        params(base, corpus, growth=GROWTH).growth,
        [read_corpus(params(base, corpus)).train[i] for i in order(corpus, base)],
    )
    begun = load_model(grown, full_precision=True).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not torch.isclose(now[name][old:], begun[name][old:]).all(dim=1).any(), name


def order(corpus: str, base: Path) -> list[int]:
    torch.manual_seed(1)
    found: list[int] = torch.randperm(len(read_corpus(params(base, corpus)).train)).tolist()
    return found


@pytest.mark.parametrize("adapter", [LORA, {**LORA, "name": "rslora"}], ids=["lora", "rslora"])
def test_what_is_published_is_the_model_that_was_trained(
    tmp_path: Path, base: Path, corpus: str, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    publish = continued_pretraining.save_model

    def keep(model: Any, *rest: Any) -> int:
        kept.append(model)
        return publish(model, *rest)

    monkeypatch.setattr(continued_pretraining, "save_model", keep)
    monkeypatch.setattr(
        continued_pretraining, "load_model", lambda folder, **_: load_model(folder, full_precision=True)
    )
    made(tmp_path / "out", params(base, corpus, adapter=adapter, growth=GROWTH))
    trained, written = kept[0].eval(), load_model(tmp_path / "out", full_precision=True)
    ids = torch.arange(300, 300 + 40)[None] + torch.tensor([[0], [66]])  # new tokens, too
    torch.testing.assert_close(written(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_killed_and_run_again_it_gives_the_same_bits(
    tmp_path: Path, base: Path, corpus: str, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = params(base, corpus, adapter=adapter, growth=GROWTH)
    made(tmp_path / "whole", chosen)
    for step in (1, 5):
        with monkeypatch.context() as patch:
            kill_after(step, patch)
            with pytest.raises(Killed):
                made(tmp_path / "again", chosen)
        shutil.rmtree(tmp_path / "again")
        assert any((tmp_path / "again.checkpoints").glob("step-*")) == (step > 1)
    made(tmp_path / "again", chosen)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_another_seed_gives_another_model(tmp_path: Path, pico_base: Path, corpus: str) -> None:
    for seed in (1, 2):
        made(tmp_path / str(seed), params(pico_base, corpus, adapter=LORA, seed=seed, held_out=0.0))
    one, two = ((tmp_path / str(seed) / "model.safetensors").read_bytes() for seed in (1, 2))
    assert one != two


def test_a_bf16_base_stays_one(tmp_path: Path, pico_base: Path, corpus: str) -> None:
    for name, adapter in (("full", FULL), ("lora", LORA)):
        said = made(tmp_path / name, params(pico_base, corpus, adapter=adapter, held_out=0.0))
        assert "held_out" not in said
        assert stored(tmp_path / name)["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_real_model_goes_on_with_real_stories_without_a_chat_template(tmp_path: Path, real_data: Path) -> None:
    """New tokens begin as a guess, with which it predicts worse than before; training makes up for that."""
    base = real_data / "stories260k" / "hf"
    source = file_source(real_data / "tinystories_2mib" / "tinystories_sample.txt", format="text")
    path = clean(tmp_path / "clean", list(Reading("s", source).records())[:120])
    sizes: dict[str, Any] = {"context_tokens": 128, "batch_tokens": 1024, "growth": {**NOTHING, "merges": 10}}
    trained = made(tmp_path / "trained", params(base, path, learning_rate=1.0e-3, tokens=1024 * 10, **sizes))
    untrained = made(tmp_path / "untrained", params(base, path, learning_rate=1.0e-9, tokens=1024, **sizes))
    before, after = trained["held_out_before"], trained["held_out"]
    assert 1.48 < before["loss"] < 1.7  # its own 1.48, and a stop token that it never wrote, in windows of 128
    assert untrained["held_out_before"] == before
    assert after["tokens"] < 0.99 * before["tokens"]
    assert after["bits_per_byte"] < untrained["held_out"]["bits_per_byte"] - 0.02
    check_loads(tmp_path / "trained", "here", chats=False)
    with pytest.raises(BadModel, match="no chat template"):
        check_loads(tmp_path / "trained", "here", chats=True)


def test_where_there_are_chats_a_template_is_needed_before_the_training(tmp_path: Path, real_data: Path) -> None:
    base = real_data / "stories260k" / "hf"
    path = clean(tmp_path / "clean", [*texts(200), *chats(20)])
    with pytest.raises(BadModel, match="no chat template"):
        made(tmp_path / "out", params(base, path))
    assert not (tmp_path / "out.checkpoints").exists()
    of = {"kind": "local", "path": str(base), "sha256": pin(base), "template": "chatml"}
    said = made(tmp_path / "two", params(base, path, of=of, rows=["text", "chat"], batch_tokens=64, tokens=128))
    assert said["added_tokens"] == ["<|im_start|>", "<|im_end|>"]
    check_loads(tmp_path / "two", "here", chats=True)


def test_chats_are_trained_in_the_form_of_the_template(tmp_path: Path, pico_base: Path) -> None:
    rows = [
        ChatExample(id=str(n), source="s", messages=(Message("user", f"say {n}"), Message("assistant", "the same")))
        for n in range(200)
    ]
    path = clean(tmp_path / "clean", list(rows))
    said = made(tmp_path / "out", params(pico_base, path, rows=["chat"], tokens=256 * 30))
    assert said["held_out"]["loss"] < 0.6 * said["held_out_before"]["loss"]
    write_records(tmp_path / "clean", texts(3))
    assert continued_pretraining.only_texts(tmp_path / "clean")


def test_a_base_that_is_not_the_one_that_is_pinned_is_refused(tmp_path: Path, pico_base: Path, corpus: str) -> None:
    of = {"kind": "local", "path": str(pico_base), "sha256": "0" * 64, "template": "own"}
    with pytest.raises(BadModel, match=r"not the model that base\.of\.sha256 names") as caught:
        made(tmp_path / "out", params(pico_base, corpus, of=of))
    (tmp_path / "plain").mkdir()
    copy_model(pico_base, tmp_path / "plain")
    assert caught.value.fix.startswith(f"set base.of.sha256={pin(tmp_path / 'plain')}")


def test_blocks_longer_than_the_model_reads_are_refused(tmp_path: Path, pico_base: Path, corpus: str) -> None:
    with pytest.raises(BadModel) as caught:
        made(tmp_path / "out", params(pico_base, corpus, context_tokens=512, batch_tokens=512))
    assert (caught.value.got, caught.value.expected) == ("256 positions", "at least 512")


def test_a_target_that_the_model_has_not_is_refused(tmp_path: Path, pico_base: Path, corpus: str) -> None:
    with pytest.raises(BadModel, match="does not fit this model"):
        made(tmp_path / "out", params(pico_base, corpus, adapter={**LORA, "targets": ["c_attn"]}))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]], ids=str)
def test_lora_on_a_weight_that_embedding_and_head_share_is_refused_and_else_published_as_trained(
    tmp_path: Path, base: Path, corpus: str, targets: list[str]
) -> None:
    chosen = params(base, corpus, adapter={**LORA, "targets": targets})
    model = load_model(base, full_precision=True)
    if model.config.tie_word_embeddings:
        with pytest.raises(BadModel, match="embedding and the output head share") as caught:
            continued_pretraining.with_lora(model, chosen.adapter, [])  # type: ignore[arg-type]
        assert set(targets) - {"q_proj"} == {name.rpartition(".")[2] for name in caught.value.examples}
        assert "set base.adapter to full, or leave the embedding" in caught.value.fix
        return
    adapted = continued_pretraining.with_lora(model, chosen.adapter, [])  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(3, 40)[None]
    expected = adapted.eval()(input_ids=ids).logits
    continued_pretraining.save_model(adapted, base, chosen, [])
    torch.testing.assert_close(load_model(base, full_precision=True)(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_lora_on_a_layer_whose_new_rows_are_trained_is_refused(tmp_path: Path, base: Path, corpus: str) -> None:
    chosen = params(base, corpus, adapter={**LORA, "targets": ["embed_tokens"]}, growth=GROWTH, held_out=0.0)
    with pytest.raises(BadModel, match="does not fit this model") as caught:
        made(tmp_path / "out", chosen)
    assert caught.value.where == "base.adapter"


def test_an_encoder_decoder_is_refused_by_its_kind(tmp_path: Path, corpus: str) -> None:
    folder = make_base(tmp_path / "t5", "t5", [f"the cat saw {n} birds on a mat" for n in range(300)], vocab_size=400)
    with pytest.raises(BadModel, match="an encoder-decoder cannot be trained further on texts") as caught:
        made(tmp_path / "out", params(folder, corpus))
    assert str(folder) in caught.value.got
