"""What tests of bases share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, pico_base: Path, tmp_path: Path) -> Path:
    """The pico base, in float32, with an output head of its own or not."""
    folder = tmp_path / "base"
    shutil.copytree(pico_base, folder)
    config = LlamaConfig.from_pretrained(pico_base, tie_word_embeddings=request.param)
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder
