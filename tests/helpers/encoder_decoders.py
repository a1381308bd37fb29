"""Pico encoder-decoder bases: the shapes of T5 and mT5, with a unigram tokenizer made from a few texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPE = {
    "d_model": 64,  # the least width that 4-bit weights are read back right at
    "d_kv": 32,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GATES = {"t5": "relu", "mt5": "gated-gelu"}

LORA = {"name": "lora", "rank": 8, "alpha": 32.0, "dropout": 0.1, "targets": ["q", "v"]}
"""PEFT's default targets for T5 and mT5."""


def pieces_of(texts: Sequence[str], vocabulary: int = 300) -> list[tuple[str, float]]:
    """The pieces of a unigram model of some texts, with their log-probabilities; padding, end and unknown first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def make_base(folder: Path, kind: str, texts: Sequence[str], **changes: Any) -> Path:
    """Writes a model folder of random weights with a tokenizer for some texts; mT5's head is not tied, T5's is."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=pieces_of(texts), extra_ids=0)
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(tokenizer) + 4, "feed_forward_proj": GATES[kind], **changes}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **shape))
    if kind == "mt5":
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.shared.weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
