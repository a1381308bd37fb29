from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from tasks.base.continued_pretraining import grow
from tasks.base.params import Growth
from tasks.base.pretraining import document, train_tokenizer
from tasks.base.stage import give_template
from tasks.base.vocabulary_extension import WORD_START, add_merges, learn_merges
from tasks.core.errors import BadData, BadModel
from tasks.core.records import ChatExample, TextExample
from tasks.ingest.stage import Reading
from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon
from tasks.models.loader import load_model
from tasks.tokenization.tokenizer import read_tokenizer
from tests.conftest import ROOT
from tests.helpers.samples import file_source, stored


def corpus(count: int = 300) -> list[Any]:
    return list(generate_rows(Recipe("s", "text", count, 5), read_lexicon(ROOT / "data" / "lexicon.yaml")))


def growth(tokens: list[str] | None = None, merges: int = 0, begin_as: str = "pieces") -> Growth:
    return Growth.model_validate({"tokens": tokens or [], "merges": merges, "begin_as": begin_as})


# --- what is learned --------------------------------------------------------------------------------------------------


def test_learning_on_gives_what_learning_in_one_go_gives(tmp_path: Path) -> None:
    """The tokenizers library, asked for 460 tokens at once, is the reference for 400 and 60 more."""
    texts = [document(row) for row in corpus()]
    texts = [text.removesuffix("<|im_end|>") for text in texts]
    whole = train_tokenizer(texts, 460)
    train_tokenizer(texts, 400).save_pretrained(tmp_path)
    add_merges(tmp_path, texts, 60)
    grown = read_tokenizer(tmp_path)
    assert grown.get_vocab() == whole.get_vocab()
    lexicon = read_lexicon(ROOT / "data/lexicon.yaml")
    unseen = [document(row) for row in generate_rows(Recipe("s", "text", 50, 99), lexicon)]  # type: ignore[arg-type]
    assert grown(unseen)["input_ids"] == whole(unseen)["input_ids"]


def test_the_most_frequent_pair_is_merged_first_by_hand() -> None:
    """aab x5, ab x3, abc x2: ab stands 10 times, then aab 5 times, then abc twice; nothing else stands twice."""
    names = {"a": 0, "b": 1, "c": 2}
    words = {(0, 0, 1): 5, (0, 1): 3, (0, 1, 2): 2}
    assert learn_merges(words, names, 10, 3) == [(0, 1), (0, 10), (10, 2)]
    with pytest.raises(BadData) as caught:
        learn_merges(words, names, 10, 4)
    assert caught.value.got == "3 pairs of tokens that occur twice"
    assert learn_merges({(0, 0, 0, 0, 0): 3}, names, 10, 2) == [(0, 0), (10, 0)]  # of equals the lower ids


def test_a_token_that_exists_and_bytes_are_not_made_again() -> None:
    names = {"a": 0, "b": 1, "ab": 2, "<0xE4>": 3, "<0xBD>": 4}
    with pytest.raises(BadData, match="too little text"):
        learn_merges({(0, 1): 9, (3, 4): 9}, names, 10, 1)


def test_a_real_tokenizer_without_words_learns_none_across_them(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(real_data / "stories260k" / "hf", folder)
    source = file_source(real_data / "tinystories_2mib" / "tinystories_sample.txt", format="text")
    stories = [row.text for row in Reading("s", source).records() if isinstance(row, TextExample)][:300]
    before = read_tokenizer(folder)
    pieces = add_merges(folder, stories, 40)
    after = read_tokenizer(folder)
    assert sorted(pieces) == list(range(512, 552))
    assert all(after.get_vocab()[token] == number for token, number in before.get_vocab().items())
    for number, parts in pieces.items():
        token = str(after.convert_ids_to_tokens(number))
        assert len({character.isalnum() for character in token.removeprefix(WORD_START)}) == 1
        assert WORD_START not in token[1:]
        assert "".join(before.convert_ids_to_tokens(parts)) == token
    assert f"{WORD_START}there" in after.get_vocab() or f"{WORD_START}little" in after.get_vocab()
    for story in [*stories[:20], "Zoë 你好 🙂"]:
        short, long = after(story)["input_ids"], before(story)["input_ids"]
        assert after.decode(short) == before.decode(long)
        assert [part for n in short for part in pieces.get(n, [n])] == long
    assert sum(len(after(s)["input_ids"]) for s in stories) < 0.96 * sum(len(before(s)["input_ids"]) for s in stories)


def test_added_tokens_keep_their_ids_when_the_encoding_grows(pico_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pico_base, folder)
    give_template(folder, ROOT / "data" / "templates" / "gemma.jinja")
    before = read_tokenizer(folder)
    new = grow(folder, growth(["hydrochloride"], merges=5), corpus())
    after = read_tokenizer(folder)
    assert all(after.get_vocab()[token] == number for token, number in before.get_vocab().items())
    assert sorted(new) == list(range(len(before), len(before) + 6))
    text = "<start_of_turn>user\nhydrochloride<end_of_turn>"
    assert after(text)["input_ids"][0] == before.get_vocab()["<start_of_turn>"]
    assert "hydrochloride" in after.convert_ids_to_tokens(after(text)["input_ids"])
    assert after.chat_template == before.chat_template
    assert after.eos_token == before.eos_token


def test_other_tokenizers_take_given_tokens_but_learn_no_merges(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram())
    unigram.train_from_iterator(["some words and some more"] * 9, trainers.UnigramTrainer(vocab_size=30))
    PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(BadModel) as caught:
        add_merges(tmp_path, ["some words"], 1)
    assert caught.value.got == "Unigram"


def test_tokens_that_are_there_already_or_twice_are_refused(base: Path) -> None:
    with pytest.raises(BadModel) as caught:
        grow(base, growth(["fresh", "<|im_end|>", "fresh"]), [])
    assert caught.value.examples == ("<|im_end|>", "fresh")


# --- what becomes of the rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin_as", ["pieces", "all"])
def test_old_logits_stay_and_new_ones_are_means(base: Path, begin_as: str) -> None:
    """A head's row that is a mean of rows gives the mean of their logits."""
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    small, before = read_tokenizer(base), load_model(base, full_precision=True)
    old: int = before.config.vocab_size
    ids = torch.arange(60).reshape(3, 20)
    then = before(ids).logits
    given = [" photosynthesis", "kilogram"]
    new = grow(base, growth(given, merges=6, begin_as=begin_as), corpus())
    grown = read_tokenizer(base)
    if begin_as == "all":
        assert not any(new.values())
    else:
        parts = [small(text, add_special_tokens=False)["input_ids"] for text in given]
        assert [new[old], new[old + 1]] == parts
        for number in range(old + 2, old + 8):
            assert "".join(small.convert_ids_to_tokens(new[number])) == grown.convert_ids_to_tokens(number)
    after = load_model(base, full_precision=True)
    now = after(ids).logits
    assert now.shape[-1] == after.config.vocab_size == old + 8
    assert torch.equal(after.model(ids).last_hidden_state, before.model(ids).last_hidden_state)
    torch.testing.assert_close(now[..., :old], then, atol=1e-6, rtol=1e-5)  # one product over more rows
    was, now_is = before.state_dict(), after.state_dict()
    for number in range(old, old + 8):
        rows = new[number] or list(range(old))
        torch.testing.assert_close(now[..., number], then[..., rows].mean(-1), atol=1e-5, rtol=1e-4)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(now_is[name][:old], was[name])
            torch.testing.assert_close(now_is[name][number], was[name][rows].mean(0))
    same = now_is["model.embed_tokens.weight"].data_ptr() == now_is["lm_head.weight"].data_ptr()
    assert same == tied


def test_rows_that_are_there_already_are_used(pico_base: Path, tmp_path: Path) -> None:
    """As Qwen's models, which have more rows than tokens."""
    folder = tmp_path / "base"
    shutil.copytree(pico_base, folder)
    model = load_model(folder, full_precision=True)
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 64, mean_resizing=False)
    model.save_pretrained(folder)
    (number,) = grow(folder, growth(["kilogram"]), [])
    grown = load_model(folder, full_precision=True)
    assert (number, grown.config.vocab_size) == (known, known + 64)
    parts = read_tokenizer(pico_base)("kilogram", add_special_tokens=False)["input_ids"]
    rows = stored(folder)["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[number], rows[parts].float().mean(0).to(rows.dtype), atol=0, rtol=0)


def test_no_growth_changes_no_file(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    assert grow(tmp_path / "base", growth(), []) == {}
    for file in pico_base.iterdir():
        assert (tmp_path / "base" / file.name).read_bytes() == file.read_bytes()


def test_chats_are_trained_from_too(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    rows = list(generate_rows(Recipe("s", "chat", 200, 5), read_lexicon(ROOT / "data" / "lexicon.yaml")))
    documents = [row for row in rows if isinstance(row, ChatExample)]
    new = grow(tmp_path / "base", growth(merges=3), documents)
    tokenizer = read_tokenizer(tmp_path / "base")
    said = " ".join(message.content for row in documents for message in row.messages)
    assert set(new) <= set(tokenizer(said)["input_ids"])
