"""Tokenizers of folders: those that keep text are read, whatever it is of, and those that lose it are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from tasks.core.errors import BadModel
from tasks.tokenization.tokenizer import encode, read_tokenizer


def test_a_folder_without_the_vocabulary_is_refused(pico_base: Path, tmp_path: Path) -> None:
    shutil.copyfile(pico_base / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    with pytest.raises(BadModel, match=r"its tokenizer (loses text|does not load)") as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for name, got in (("missing", "no folder"), ("file", "a file")):
        with pytest.raises(BadModel, match="there is no such tokenizer") as caught:
            read_tokenizer(tmp_path / name)
        assert (caught.value.where, caught.value.got) == (str(tmp_path / name), got)
        assert caught.value.expected
        assert caught.value.fix


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "phi-4-mini", "phi-4-base"])
def test_so_are_real_configurations_alone(name: str, real_data: Path) -> None:
    with pytest.raises(BadModel, match="its tokenizer"):
        read_tokenizer(real_data / "tokenizers_ort" / name)


def test_the_files_of_older_formats_are_read(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them: every byte is a token, and `th` is one more."""
    vocabulary = {text: number for number, text in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "th", "<|end|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    about = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|end|>", "bos_token": "<|end|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert encode(tokenizer, ["that"]) == [[vocabulary["th"], vocabulary["a"], vocabulary["t"]]]


def test_a_vocabulary_of_something_else_than_language_is_read(tmp_path: Path) -> None:
    bases = Tokenizer(models.WordLevel({"A": 0, "C": 1, "G": 2, "T": 3, "[UNK]": 4}, unk_token="[UNK]"))
    bases.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bases, unk_token="[UNK]").save_pretrained(tmp_path)
    assert encode(read_tokenizer(tmp_path), ["G A T T A C A"]) == [[2, 0, 3, 3, 0, 1, 0]]


def test_one_that_lower_cases_is_read(tmp_path: Path) -> None:
    from tokenizers import decoders, normalizers

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    text = "The quick brown fox jumps over 12 lazy dogs. Every letter too: bcdfghjklmnpqvwxyz"
    words.train_from_iterator([text] * 3, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path)
