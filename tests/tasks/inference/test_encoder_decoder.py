from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from tasks.adapters.attach import attach, init_adapter, load_adapted, load_packaged, published_state, save_adapter
from tasks.adapters.files import CONFIG
from tasks.adapters.params import LoraAdapter
from tasks.base.stage import check_loads, give_template
from tasks.core.errors import BadData, BadModel, BadParams
from tasks.core.progress import Progress
from tasks.core.records import ChatExample, Message, PreferencePair, Record, SeqPair
from tasks.deltas.weight_deltas import changes_of
from tasks.evaluate.held_out import answer_pairs
from tasks.inference.chat import answer_text
from tasks.inference.encoder_decoder import PairRow, check_room, generate_targets, score_pairs
from tasks.inference.logprobs import score_rows
from tasks.inference.params import GREEDY
from tasks.inference.rendered_rows import row_of
from tasks.merge.merged_model import merge, write_merged
from tasks.merge.stage import kl_divergence
from tasks.models.device import seed_everything
from tasks.models.loader import load_model
from tasks.models.safetensors_reader import stored_in
from tasks.render.stage import check_kinds, render_rows
from tasks.tokenization.architecture import DECODER, ENCODER_DECODER, architecture_in, architecture_of
from tasks.tokenization.chat_template import load_tokenizer, template_digest
from tasks.tokenization.tokenizer import decode
from tasks.train.batching import kind_of_rows
from tasks.train.params import Method
from tests.conftest import ROOT
from tests.helpers.encoder_decoders import LORA, SHAPE, make_base
from tests.helpers.samples import EVALUATE, LOREFT, ORPO, QLORA, RENDER, SFT, method
from tests.helpers.training import held_out_loss, loss_of, train

TEXTS = [
    ("my phone does not charge any more", "complaint"),
    ("what a lovely morning", "no complaint"),
    ("the train was late again, and nobody said a word about it to anyone on the platform", "complaint"),
    ("thanks for the quick reply", "no complaint"),
    ("hi", "no complaint"),
    ("never again will I buy here", "complaint"),
]
METHODS = {
    "lora": method(LORA, SFT, learning_rate=0.02),
    "qlora": method({**QLORA, "targets": ["q", "v"]}, SFT, learning_rate=0.02),
    "reft": method(LOREFT, SFT, learning_rate=0.02),
}
KINDS = ["t5", "mt5"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    texts = [text for pair in TEXTS for text in pair]
    return {kind: make_base(tmp_path_factory.mktemp(kind) / "base", kind, texts) for kind in KINDS}


@pytest.fixture(scope="module")
def unigram(bases: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(bases["mt5"])


@pytest.fixture(scope="module")
def rendered(unigram: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    made, _ = render_rows([pair(str(n), *texts) for n, texts in enumerate(TEXTS)], unigram, RENDER)
    rows = [row for (_, kind), found in made.items() if kind == "pair" for row in found]
    assert len(rows) == len(TEXTS)
    return sorted(rows, key=lambda row: str(row["id"]))


@pytest.fixture(scope="module")
def rows(rendered: list[dict[str, Any]]) -> list[PairRow]:
    return [PairRow(row["input_ids"], row["target_ids"]) for row in rendered]


def pair(row_id: str, given: str = "a", wanted: str = "b") -> SeqPair:
    return SeqPair(id=row_id, source="s", input=given, target=wanted)


def chat(row_id: str) -> ChatExample:
    return ChatExample(id=row_id, source="s", messages=(Message("user", "a"), Message("assistant", "b")))


def bart() -> Any:
    """A family that counts positions, adds a bias to its logits and shifts targets by a function of its own."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 320}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = AutoConfig.for_model(
        "bart", **shape, **heads, **ids, max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None
    )
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def model_of(kind: str, bases: dict[str, Path]) -> Any:
    return bart() if kind == "bart" else load_model(bases[kind]).float()


# --- what it is -------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_model_say_what_they_are(bases: dict[str, Path], pico_base: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        assert architecture_in(bases[kind]) is architecture_of(load_model(bases[kind])) is ENCODER_DECODER
    assert architecture_in(pico_base) is architecture_of(load_model(pico_base)) is DECODER
    assert architecture_in(tmp_path) is DECODER  # a folder with a tokenizer only


def test_no_chat_template_is_needed_and_none_is_taken(bases: dict[str, Path], tmp_path: Path) -> None:
    assert check_loads(bases["t5"], "here", chats=True).num_parameters() == load_model(bases["t5"]).num_parameters()
    assert template_digest(load_tokenizer(bases["t5"])) == ""
    shutil.copytree(bases["t5"], tmp_path / "base")
    with pytest.raises(BadModel, match="reads inputs without a chat template"):
        give_template(tmp_path / "base", ROOT / "data" / "templates" / "chatml.jinja")


def test_mt5s_head_stays_its_own(bases: dict[str, Path]) -> None:
    model: Any = load_model(bases["mt5"])
    stored = load_file(bases["mt5"] / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"].to(model.dtype))
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_a_base_that_does_not_say_how_targets_begin_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["t5"], tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        about = json.loads(path.read_text())
        about["decoder_start_token_id"] = None
        path.write_text(json.dumps(about))
    with pytest.raises(BadModel, match="does not say with which token a target begins"):
        check_loads(tmp_path / "base", "here", chats=True)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "never heard of"}')
    with pytest.raises(BadModel, match="does not load"):
        architecture_in(tmp_path)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_an_input_that_is_cut_keeps_its_end_token(unigram: PreTrainedTokenizerBase) -> None:
    """As the tokenizer's own truncation does; a target that is cut has no end to learn."""
    params = RENDER.model_copy(update={"max_tokens": 5, "too_long": "truncate"})
    made, counts = render_rows([pair("1", TEXTS[2][0], TEXTS[2][0])], unigram, params)
    (row,) = (row for (_, kind), found in made.items() if kind == "pair" for row in found)
    assert row["input_ids"] == unigram(TEXTS[2][0], truncation=True, max_length=5)["input_ids"]
    assert row["target_ids"] == unigram(TEXTS[2][0])["input_ids"][:5]
    assert unigram.eos_token_id not in row["target_ids"]
    assert counts["truncated"] == 1


@pytest.mark.parametrize("target", ["", " \n"])
def test_an_empty_target_is_refused(unigram: PreTrainedTokenizerBase, target: str) -> None:
    with pytest.raises(BadData, match="1 rows cannot be rendered") as refused:
        render_rows([pair("empty", "a", target), pair("fine")], unigram, RENDER)
    assert refused.value.examples == ("empty: its target is empty, so there is nothing to learn",)


def test_rows_that_a_kind_of_base_cannot_learn_are_refused() -> None:
    preference = PreferencePair(id="p", source="s", prompt=(Message("user", "q"),), chosen="a", rejected="b")
    mixed: list[Record] = [chat("1"), pair("2"), preference]
    with pytest.raises(BadData, match="of the kind encoder-decoder, which cannot learn these rows") as refused:
        check_kinds(mixed, ENCODER_DECODER)
    assert refused.value.got == "1 chat rows, 1 preference rows"
    assert refused.value.expected == "inputs and targets, {input: ..., target: ...}"
    with pytest.raises(BadData, match="of the kind decoder, which cannot learn these rows") as refused:
        check_kinds([pair("1"), pair("2")], DECODER)
    assert refused.value.got == "2 pair rows"
    check_kinds(mixed, DECODER)
    check_kinds([pair("1")], ENCODER_DECODER)


def test_preferences_are_refused() -> None:
    assert kind_of_rows(method(LORA, SFT).objective, ENCODER_DECODER) == "pair"
    assert kind_of_rows(method(LORA, SFT).objective, DECODER) == "chat"
    assert kind_of_rows(method(LORA, ORPO).objective, DECODER) == "preference"
    with pytest.raises(BadParams, match="preferences are for decoders only") as refused:
        kind_of_rows(method(LORA, ORPO).objective, ENCODER_DECODER)
    assert refused.value.got == "orpo on an encoder-decoder base"


# --- scores and answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "bart"])
def test_loss_and_gradient_are_those_of_the_model_on_its_own_labels(
    bases: dict[str, Path], rows: list[PairRow], kind: str
) -> None:
    """Against transformers' own loss on a batch that is padded on both sides, labels with -100."""
    ours, theirs = (model_of(kind, bases).requires_grad_(True) for _ in range(2))
    loss, _ = loss_of(ours, [(row,) for row in rows], METHODS["lora"])
    inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.input_ids) for r in rows], True, 0)
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.target_ids) for r in rows], True, -100)
    expected = theirs(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss
    assert (labels == -100).any()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, one), (_, two) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [*KINDS, "bart"])
def test_a_row_has_the_same_scores_alone_and_in_a_batch(bases: dict[str, Path], rows: list[PairRow], kind: str) -> None:
    model = model_of(kind, bases)
    with torch.no_grad():
        together = score_pairs(model, rows)
        alone = torch.cat([score_pairs(model, [row]).logp for row in rows])
    torch.testing.assert_close(together.logp, alone, rtol=1e-4, atol=1e-5)
    assert together.row.tolist() == [n for n, row in enumerate(rows) for _ in row.target_ids]


@pytest.mark.parametrize("trained", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_soft_prompts_are_scored_and_answered_as_peft_does(
    bases: dict[str, Path], unigram: PreTrainedTokenizerBase, rows: list[PairRow], trained: str
) -> None:
    """Which put vectors before the encoder's input, the decoder's, or both's keys and values."""
    import peft

    torch.manual_seed(0)
    config = getattr(peft, trained)(task_type=ENCODER_DECODER.task_type, num_virtual_tokens=3)
    model: Any = peft.get_peft_model(model_of("mt5", bases), config).eval()
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.target_ids) for r in rows], True, -100)
    inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.input_ids) for r in rows], True, 0)
    with torch.no_grad():
        loss = -score_pairs(model, rows).logp.mean().item()
        theirs = model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss.item()
    assert loss == pytest.approx(theirs, rel=1e-5)
    given = [row.input_ids for row in rows]
    alone = [generate_targets(model, unigram, [ids], 5, GREEDY)[0] for ids in given]
    assert generate_targets(model, unigram, given, 5, GREEDY) == alone


def test_rows_are_scored_by_what_they_are(
    bases: dict[str, Path], pico_base: Path, rendered: list[dict[str, Any]]
) -> None:
    row = row_of(rendered[0])
    assert isinstance(row, PairRow)
    assert row.tokens == len(rendered[0]["input_ids"]) + len(rendered[0]["target_ids"])
    scored = score_rows(load_model(bases["t5"]), [row])
    assert len(scored.logp) == len(row.target_ids)
    asked = row_of({"ids": [5, 6, 7], "mask": [False, True, True], "prompt_tokens": 1})
    assert len(score_rows(load_model(pico_base), [asked]).logp) == 2


@pytest.mark.parametrize("kind", [*KINDS, "bart"])
def test_greedy_answers_are_those_of_generate_one_row_at_a_time(
    bases: dict[str, Path], unigram: PreTrainedTokenizerBase, rows: list[PairRow], kind: str
) -> None:
    """Inputs of unlike length in one batch; some answers end by themselves, and others go on beside their padding."""
    model = model_of(kind, bases)
    torch.manual_seed(3)
    head = 0.2 * torch.randn_like(model.lm_head.weight)  # one that says something else at every step
    head[unigram.eos_token_id] *= 5
    model.lm_head.weight = torch.nn.Parameter(head)
    inputs = [row.input_ids for row in rows]
    found = generate_targets(model, unigram, inputs, 7, GREEDY)
    assert any(len(answer) < 7 for answer in found)
    for ids, answer in zip(inputs, found, strict=True):
        alone = model.generate(torch.tensor([list(ids)]), max_new_tokens=7, do_sample=False)[0, 1:].tolist()
        assert answer == alone
        assert generate_targets(model, unigram, [ids], 7, GREEDY) == [alone]
        assert len(answer) == 7 or answer[-1] == unigram.eos_token_id


def test_what_is_longer_than_the_positions_of_a_model_is_refused(bases: dict[str, Path]) -> None:
    model = bart()
    check_room(model, [("1", [5] * 64)], 64)
    with pytest.raises(BadData, match="1 inputs are longer than the model can read") as refused:
        check_room(model, [("1", [5] * 65), ("2", [5])], 64)
    assert refused.value.examples == ("1: 65 tokens",)
    with pytest.raises(BadData, match=r"evaluate\.max_new_tokens is more than the model can write"):
        check_room(model, [("2", [5])], 65)
    check_room(load_model(bases["t5"]), [("1", [5] * 5000)], 5000)  # T5 counts distances, and has no end


def test_answers_of_an_evaluation_are_those_that_serving_gives(
    bases: dict[str, Path], unigram: PreTrainedTokenizerBase, rendered: list[dict[str, Any]]
) -> None:
    model: Any = load_model(bases["mt5"]).float()
    for one, (given, wanted) in zip(answer_pairs(model, unigram, rendered, EVALUATE), TEXTS, strict=True):
        reply = answer_text(model, unigram, given, EVALUATE.max_new_tokens)
        assert (one.prompt, one.target, one.prediction) == (given, wanted, reply.text)
        assert one.score == float(one.prediction == one.target)
        ids, labels = (torch.tensor([unigram(text)["input_ids"]]) for text in (given, wanted))
        assert -one.logp / one.tokens == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
        assert one.tokens == labels.shape[1]
        assert reply.prompt_tokens == ids.shape[1]


# --- training ---------------------------------------------------------------------------------------------------------


def trained(
    base: Path, params: Method, rows: list[PairRow], folder: Path, die_after: int = 0
) -> tuple[Any, dict[str, torch.Tensor]]:
    seed_everything(params.seed)
    model = init_adapter(base, params.adapter).train()

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == die_after:
            raise KeyboardInterrupt

    train(model, [(row,) for row in rows], params, folder, Progress("t", 1, "steps"), on_row)
    return model, {key: tensor.detach().clone() for key, tensor in published_state(model).items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_adapter_and_so_does_a_resumed_training(
    bases: dict[str, Path], rows: list[PairRow], tmp_path: Path, kind: str, name: str
) -> None:
    params = METHODS[name].model_copy(update={"epochs": 2})
    _, whole = trained(bases[kind], params, rows, tmp_path / "one")
    _, again = trained(bases[kind], params, rows, tmp_path / "two")
    with pytest.raises(KeyboardInterrupt):
        trained(bases[kind], params, rows, tmp_path / "three", die_after=3)
    _, resumed = trained(bases[kind], params, rows, tmp_path / "three")
    for other in (again, resumed):
        assert whole.keys() == other.keys()
        assert all(torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_on_what_it_sees(
    bases: dict[str, Path], rows: list[PairRow], tmp_path: Path, name: str
) -> None:
    params = METHODS[name].model_copy(update={"epochs": 12})
    seed_everything(1)
    examples = [(row,) for row in rows]
    before = held_out_loss(init_adapter(bases["mt5"], params.adapter), examples, params)
    model, _ = trained(bases["mt5"], params, rows, tmp_path)
    assert held_out_loss(model, examples, params) < before - 0.05


def test_an_adapter_is_peft_s_own_sequence_to_sequence_adapter_and_merges_as_peft_merges_it(
    bases: dict[str, Path], rows: list[PairRow], rendered: list[dict[str, Any]], tmp_path: Path
) -> None:
    from peft import PeftModel

    adapter = METHODS["lora"].adapter
    model, _ = trained(bases["mt5"], METHODS["lora"], rows, tmp_path / "checkpoints")
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["task_type"] == "SEQ_2_SEQ_LM"
    theirs: Any = PeftModel.from_pretrained(load_model(bases["mt5"]), tmp_path / "adapter")
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    ours = load_adapted(bases["mt5"], tmp_path / "adapter", adapter)
    with torch.no_grad():
        assert torch.equal(score_pairs(ours, rows).logp, score_pairs(theirs, rows).logp)
    # q and v of two encoder layers, and twice of two decoder layers
    assert len(changes_of(tmp_path / "adapter", stored_in(bases["mt5"]))) == 12
    (tmp_path / "merged").mkdir()
    made = merge(bases["mt5"], tmp_path / "adapter")
    write_merged(bases["mt5"], tmp_path / "adapter", {tmp_path / "merged": made}, 1 << 30)
    exact = AutoModelForSeq2SeqLM.from_pretrained(bases["mt5"], dtype=torch.float32)
    merged = dict(PeftModel.from_pretrained(exact, tmp_path / "adapter").merge_and_unload().named_parameters())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, merged[name].data, rtol=1e-5, atol=1e-6)
    probes = [{"input_ids": row["input_ids"], "labels": row["target_ids"]} for row in rendered]
    found = kl_divergence(ours, load_packaged(tmp_path / "merged"), probes)
    assert found.mean_kl < 1e-3
    assert found.tokens == sum(len(row.target_ids) for row in rows)


def test_the_difference_of_two_is_the_kullback_leibler_divergence_over_targets(
    bases: dict[str, Path], rows: list[PairRow]
) -> None:
    """Against PyTorch's own, row by row."""
    first, second = (model_of("mt5", bases) for _ in range(2))
    with torch.no_grad():
        second.shared.weight += 0.1 * torch.randn_like(second.shared.weight)
    found = kl_divergence(first, second, [{"input_ids": r.input_ids, "labels": r.target_ids} for r in rows])
    total = 0.0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.target_ids])
        with torch.no_grad():
            p, q = (m(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1) for m in (first, second))
        total += F.kl_div(q, p, log_target=True, reduction="sum").item()
    assert found.mean_kl == pytest.approx(total / found.tokens, rel=1e-4)
    assert found.mean_kl > 0


def test_what_cannot_be_merged_is_packaged_with_its_base(
    bases: dict[str, Path], rows: list[PairRow], tmp_path: Path
) -> None:
    model, _ = trained(bases["t5"], METHODS["reft"], rows, tmp_path / "checkpoints")
    shutil.copytree(bases["t5"], tmp_path / "model")
    (tmp_path / "model" / "adapter").mkdir()
    save_adapter(model, tmp_path / "model" / "adapter")
    again = load_packaged(tmp_path / "model")
    model.eval()
    with torch.no_grad():
        assert torch.equal(score_pairs(again, rows).logp, score_pairs(model, rows).logp)
        assert not torch.equal(score_pairs(again, rows).logp, score_pairs(load_model(bases["t5"]), rows).logp)


def test_the_recipe_s_adapter_has_the_known_size_on_the_shape_of_mt0_large() -> None:
    """2,359,296 trained numbers, as PEFT's documentation says; on meta tensors, without weights."""
    from peft import get_peft_model

    from tasks.adapters.peft_configs import peft_config
    from tasks.orchestration.params import load_params

    params = load_params(ROOT / "recipes" / "lora-mt0-twitter.yaml")
    large = {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16}
    config = AutoConfig.for_model("mt5", **{**SHAPE, **large}, vocab_size=250112, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
        adapted = get_peft_model(model, peft_config(params.train["lora"].adapter, task=ENCODER_DECODER.task_type))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 2_359_296


def test_lora_on_the_embedding_that_encoder_and_decoder_share_is_refused(bases: dict[str, Path]) -> None:
    """PEFT wraps it where neither of them looks, so that it would change nothing."""
    params = {**LORA, "targets": ["shared", "q"]}
    with pytest.raises(BadModel, match="hold the embedding themselves"):
        init_adapter(bases["t5"], method(params, SFT).adapter)


def test_an_adapter_of_a_decoder_does_not_go_onto_an_encoder_decoder(
    bases: dict[str, Path], pico_base: Path, tmp_path: Path
) -> None:
    adapter = LoraAdapter.model_validate({**LORA, "targets": ["q_proj"]})
    save_adapter(init_adapter(pico_base, adapter), tmp_path)
    with pytest.raises(BadModel, match="is an adapter for another base"):
        attach(load_model(bases["t5"]), tmp_path)


def test_pairs_are_shown_as_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    from flows.files.show_tokens import render
    from tasks.render.params import Render

    (tmp_path / "rows.jsonl").write_text('{"input": "what a lovely morning", "target": "no complaint"}\n')
    found = render(tmp_path / "rows.jsonl", bases["mt5"], 2, Render(), None)
    assert [row.place.rpartition(" ")[2] for row in found.shown] == ["input", "target"]
    assert [{trained for _, trained in row.tokens} for row in found.shown] == [{False}, {True}]
    assert found.counts["rows"] == 1
    assert found.counts["target_tokens"] == len(found.shown[1].tokens)
    assert not found.refused
    tokenizer = load_tokenizer(bases["mt5"])
    assert decode(tokenizer, tokenizer("no complaint")["input_ids"]) == "no complaint"
