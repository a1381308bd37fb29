from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.base.perplexity import PerplexityFigures, perplexity
from tasks.core.errors import Diverged
from tasks.core.records import TextExample
from tasks.ingest.stage import Reading
from tasks.models.loader import load_model
from tasks.tokenization.tokenizer import read_tokenizer
from tests.helpers.samples import file_source


def constant(vocabulary: int, weight: float = 0.0) -> LlamaForCausalLM:
    """A model whose head has the same number everywhere: all tokens have the same logit, or NaN."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1
        )
    )
    nn.init.constant_(model.lm_head.weight, weight)
    return model


def measured(model: Any, rows: Sequence[Sequence[int]], text_bytes: int = 1, **sizes: int) -> PerplexityFigures:
    found = perplexity(model, rows, text_bytes, **{"context_tokens": 8, "batch_tokens": 32, **sizes})
    assert found is not None
    return found


def test_who_knows_nothing_has_the_size_of_the_vocabulary_as_perplexity() -> None:
    found = measured(constant(64), [[1, 2, 3], [4, 5], list(range(30)), [6]], text_bytes=32)
    assert (found.rows, found.tokens) == (4, 2 + 1 + 29)
    assert found.loss == pytest.approx(math.log(64))
    assert found.perplexity == pytest.approx(64)
    assert found.bits_per_byte == pytest.approx(6.0)  # 32 tokens of 6 bits each for 32 bytes


def test_each_token_is_predicted_once_whatever_is_computed_at_a_time(pico_base: Path) -> None:
    """Against windows that are read one by one, without padding: here written out for a context of 8."""
    model = load_model(pico_base, full_precision=True)
    rows = [list(range(5, 5 + n)) for n in (2, 8, 9, 15, 16, 40)]
    nats, tokens = 0.0, 0
    for row in rows:
        for start in range(0, len(row), 7):
            ids = torch.tensor([row[start : start + 8]])
            if ids.shape[1] > 1:
                logits = model(ids).logits[0, :-1]
                nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                tokens += ids.shape[1] - 1
    for batch_tokens in (1, 17, 1000):
        found = measured(model, rows, batch_tokens=batch_tokens)
        assert found.tokens == tokens == sum(len(row) - 1 for row in rows)
        assert found.loss == pytest.approx(nats / tokens, rel=2e-3)  # where this machine computes in bf16


def test_a_real_model_predicts_real_stories_as_well_as_is_known(real_data: Path) -> None:
    """1.480 nats per token on the first 200 stories, as measured for the conversion of this model."""
    folder = real_data / "stories260k" / "hf"
    source = file_source(real_data / "tinystories_2mib" / "tinystories_sample.txt", format="text")
    stories = [r.text for r in Reading("s", source).records() if isinstance(r, TextExample)][:200]
    rows = read_tokenizer(folder)(stories, verbose=False)["input_ids"]
    size = sum(len(story.encode()) for story in stories)
    model = load_model(folder)
    found = measured(model, rows, size, context_tokens=512, batch_tokens=4096)
    assert found.loss == pytest.approx(1.480, abs=0.01)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / size)
    assert measured(model, rows[:40], context_tokens=16, batch_tokens=4096).loss > found.loss + 0.2


def test_nothing_to_predict_gives_no_figure() -> None:
    nothing: list[list[list[int]]] = [[], [[]], [[3]]]
    for rows in nothing:
        assert perplexity(constant(4), rows, 0, context_tokens=4, batch_tokens=4) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(value: float) -> None:
    with pytest.raises(Diverged, match="not a number"):
        measured(constant(4, value), [[1, 2, 3]])


def test_a_model_in_training_stays_in_training() -> None:
    model = constant(4)
    measured(model, [[1, 2]])
    assert model.training
