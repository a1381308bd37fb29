"""Positions that follow the longest row of a batch: every row has its own, whatever stands beside it or came before."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.evaluate.continuation_scores import Continuation, score_continuations
from tasks.inference.continuations import continuations
from tasks.inference.logprobs import score_tokens
from tasks.inference.params import GREEDY
from tasks.inference.prefix_sharing import can_pack
from tasks.inference.rope import alike
from tasks.inference.rows import TokenRow

TRAINED = 16
"""The length that the frequencies are made for."""

ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "default": {"rope_type": "default"},
}
LENGTHS = (7, 40, 12, 25, 16, 17, 40)


def model_of(rope: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAINED if rope == "dynamic" else 64,
        rope_parameters={"rope_theta": 10_000.0, **ROPES[rope]},
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rows() -> list[TokenRow]:
    drawn = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (length,), generator=drawn).tolist() for length in LENGTHS]
    return [TokenRow(row, [False] * 3 + [True] * (len(row) - 3), 3) for row in ids]


def own_sum(model: Any, row: TokenRow, *, read: int | None = None) -> float:
    """The row's log-probability by a copy of the model that has seen nothing else, and reads its first tokens alone."""
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logp = deepcopy(model)(input_ids=ids[:, :read], use_cache=False).logits[0].log_softmax(-1)
    return float(logp[: len(row.ids) - 1].gather(1, ids[0, 1:, None])[2:].sum())


@pytest.mark.parametrize("rope", ROPES)
def test_a_rows_score_is_its_own(rope: str) -> None:
    model, given = model_of(rope), rows()
    pristine = deepcopy(model)
    given.append(TokenRow(given[1].ids[:14], given[1].mask[:14], 3))  # the beginning of a long one
    own = torch.tensor([own_sum(pristine, row) for row in given])
    endings = [Continuation(row.ids[:3], row.ids[3:]) for row in given]
    with torch.no_grad():
        together = score_tokens(model, given).row_sums()
        alone = torch.cat([score_tokens(model, [row]).row_sums() for row in reversed(given)]).flip(0)
        score_tokens(model, [given[1]])
        short = [given[0], given[2], given[4]]  # after a long one, and in one sequence
        behind = score_tokens(model, short).row_sums()
    scored = torch.tensor([each.logp for each in score_continuations(model, endings)])
    assert can_pack(model, TRAINED)
    torch.testing.assert_close(behind, own[[0, 2, 4]], rtol=0, atol=1e-4)
    for found in (together, alone):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4)  # 37 tokens of 1e-5 nats at most
    unread = torch.tensor([own_sum(pristine, row, read=-1) for row in given])  # an ending's last token is never read
    torch.testing.assert_close(scored, unread, rtol=0, atol=1e-4)
    if rope in ("dynamic", "longrope"):  # or the comparison would show nothing
        ids = torch.tensor([[*given[0].ids, *[0] * 33]])
        mask = torch.tensor([[1] * 7 + [0] * 33])
        with torch.no_grad():
            beside = pristine(input_ids=ids, attention_mask=mask).logits[0, :6].log_softmax(-1)
        as_padded = float(beside.gather(1, ids[0, 1:7, None])[2:].sum())
        assert abs(as_padded - float(own[0])) > 1e-3


@pytest.mark.parametrize("rope", ROPES)
def test_what_is_written_after_a_prompt_is_its_own(rope: str) -> None:
    model = model_of(rope)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    prompts = [row.ids[:length] for row, length in zip(rows(), (5, 30, 12, 20, 3, 14, 40), strict=True)]
    together = continuations(model, tokenizer, prompts, 6, GREEDY)
    for prompt, written in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        fresh = deepcopy(model_of(rope))
        out = fresh.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        assert written == out[0, len(prompt) :].tolist()


def test_rows_stand_together_where_they_may() -> None:
    assert alike(model_of("default").config, LENGTHS) == [list(range(7))]
    assert alike(model_of("yarn").config, LENGTHS) == [list(range(7))]
    assert alike(model_of("longrope").config, LENGTHS) == [[0, 2, 4], [1, 3, 5, 6]]
    assert alike(model_of("dynamic").config, LENGTHS) == [[0, 2, 4], [1, 6], [3], [5]]
