from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadModel
from tasks.tokenization.tokenizer import read_tokenizer
from tasks.tokenization.tokenizer_steps import check_steps


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


HOSTILE = {
    "growth": {"normalizer": sequence(*[replace("a", "aa")] * 40)},
    "growth by a pattern": {"normalizer": sequence(*[replace(".", "xxxxxxxx", "Regex")] * 12)},
    "growth of a rare word": {"normalizer": sequence(replace("qzv", "k" * 900), replace("k", "j" * 900))},
    "growth before each character": {"normalizer": sequence(*[replace("", "xx")] * 20)},
    "long content": {"normalizer": replace("rare", "b" * 10_000_000)},
    "a pattern without end": {"normalizer": replace(r"(a|aa)+\d", "", "Regex")},
    "a split without end": {"pre_tokenizer": split(r"(a+a+)+\z!")},
    "growth when decoded": {"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 30}},
}


@pytest.mark.parametrize("steps", HOSTILE.values(), ids=list(HOSTILE))
def test_a_tokenizer_that_blows_up_is_refused_by_name(
    steps: dict[str, Any], pico_base: Path, tmp_path: Path, small_limits: None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico_base, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | steps))
    with pytest.raises(BadModel, match="its tokenizer") as caught:
        read_tokenizer(folder)
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)


LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
USUAL = {
    "none": {},
    "spaces": {
        "normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        "decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]},
    },
    "many steps": {"normalizer": sequence({"type": "NFKC"}, *[replace(each, "...") for each in "…‥⋯︙"])},
    "a known split": {"pre_tokenizer": split(LLAMA_3)},
    "white space": {"normalizer": sequence(replace(r"\s+", " ", "Regex"), {"type": "Lowercase"})},
}


@pytest.mark.parametrize("steps", USUAL.values(), ids=list(USUAL))
def test_usual_steps_are_taken(steps: dict[str, Any], tmp_path: Path, small_limits: None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(steps))
    check_steps(tmp_path)


def test_a_folder_without_the_file_has_no_steps(tmp_path: Path) -> None:
    check_steps(tmp_path)
