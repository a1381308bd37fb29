"""Joined rows against rows of their own, in float32: hidden states, losses, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tasks.adapters.attach import make_trainable
from tasks.adapters.params import AnyAdapter
from tasks.inference import prefix_sharing
from tasks.inference.frozen_layer_cache import FrozenLayerCache
from tasks.inference.logprobs import score_tokens
from tasks.inference.prefix_sharing import PrefixGroup, can_pack, drops, pack
from tasks.inference.rows import Scored, TokenRow
from tasks.train.objectives import orpo_loss
from tests.helpers.samples import LORA, LOREFT, SFT, method

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi", "GPT2", "GPTNeoX"]
SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
OTHERS: dict[str, dict[str, Any]] = {"GPT2": {"num_key_value_heads": 4}, "Phi": {"num_key_value_heads": 4}}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "loreft last": LOREFT,
    "loreft both ends": {**LOREFT, "positions": "f2+l3"},
}


def model_of(family: str, adapter: str | None = "lora", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **OTHERS.get(family, {}), **changes})
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    if adapter:
        model = make_trainable(model, adapter_of(adapter))
        for parameter in model.parameters():
            if parameter.requires_grad and "rotation" not in str(parameter):
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def adapter_of(name: str) -> AnyAdapter:
    return method(ADAPTERS[name], SFT).adapter


def pairs() -> list[TokenRow]:
    """Chosen first, then rejected: prompts and replies of many lengths, one prompt asked twice."""
    torch.manual_seed(1)
    shapes = ((9, 4, 7), (3, 6, 2), (1, 1, 5), (14, 3, 3))
    prompts = [torch.randint(1, 120, (p,)).tolist() for p, _, _ in shapes]
    rows = []
    for which in (1, 2):
        for prompt, shape in zip(prompts, shapes, strict=True):
            reply = torch.randint(1, 120, (shape[which],)).tolist()
            rows.append(TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt)))
    return [*rows, rows[0]._replace(ids=[*rows[0].ids[:9], 7, 8], mask=[False] * 9 + [False, True])]


def loss_and_gradients(model: Any, rows: list[TokenRow]) -> tuple[Scored, Tensor, dict[str, Tensor]]:
    scored = score_tokens(model, rows)
    means, n = scored.row_means(), len(rows) // 2
    loss = orpo_loss(means[:n], means[n : 2 * n], -scored.logp[scored.row < n].mean(), weight=0.1).loss
    model.zero_grad()
    loss.backward()
    return scored, loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def repeated(monkeypatch: pytest.MonkeyPatch, model: Any, rows: list[TokenRow]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(prefix_sharing, "can_pack", lambda base, longest: False)  # read at each call
        return loss_and_gradients(model, rows)


def seen_tokens(model: Any, rows: list[TokenRow]) -> int:
    """How many tokens the layers are given."""
    counts = list[int]()
    score_tokens(model, rows)  # what the model can do is found out by a few tokens of its own, once
    handle = model.get_input_embeddings().register_forward_hook(lambda m, args, out: counts.append(args[0].numel()))
    score_tokens(model, rows)
    handle.remove()
    return sum(counts)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_neither_loss_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str, adapter: str
) -> None:
    model, rows = model_of(family, adapter), pairs()
    scored, loss, gradients = loss_and_gradients(model, rows)
    expected, their_loss, theirs = repeated(monkeypatch, model, rows)
    torch.testing.assert_close(scored.logp, expected.logp, rtol=1e-5, atol=1e-5)
    assert torch.equal(scored.row, expected.row)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm() + 1e-8, name
    assert seen_tokens(model, rows) == 9 + 4 + 7 + 2 + 3 + 6 + 2 + 1 + 1 + 5 + 14 + 3 + 3


def test_twenty_steps_take_the_same_course(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    for shared in (True, False):
        model, rows = model_of("Llama"), pairs()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(20):
            _, loss, _ = loss_and_gradients(model, rows) if shared else repeated(monkeypatch, model, rows)
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.1


def test_twice_the_same_bits() -> None:
    (_, one, first), (_, other, second) = (loss_and_gradients(model_of("Llama"), pairs()) for _ in range(2))
    assert torch.equal(one, other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointed_layers_attend_the_same_the_second_time() -> None:
    model = model_of("Llama")
    _, loss, gradients = loss_and_gradients(model, pairs())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again, recomputed = loss_and_gradients(model, pairs())
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


def test_other_batches_of_the_model_are_computed_as_before() -> None:
    model, ids = model_of("Qwen2").eval(), torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    before = model(input_ids=ids, attention_mask=mask).logits
    score_tokens(model, pairs())
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert not [key for key in model.get_base_model().config.to_dict() if key.startswith("_attn")]


def test_the_layout_of_two_pairs_and_a_row_without_a_prompt() -> None:
    rows = [
        TokenRow([5, 6, 7, 8], [False, False, True, True], 2),
        TokenRow([1, 2], [False, True], 0),
        TokenRow([5, 6, 9], [False, False, True], 2),
        TokenRow([1, 3], [False, True], 0),
    ]
    joined = pack([row.ids for row in rows], [row.prompt_tokens for row in rows], torch.device("cpu"))
    assert joined.ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 1, 3]]
    assert joined.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 0, 1]]
    assert joined.trees == (PrefixGroup(0, 2, (2, 1)), PrefixGroup(5, 0, (2,)), PrefixGroup(7, 0, (2,)))
    assert joined.places == [[0, 1, 2, 3], [5, 6], [0, 1, 4], [7, 8]]


@pytest.mark.parametrize(
    ("family", "changes", "longest", "expected"),
    [
        ("Llama", {}, 10**6, True),
        ("Llama", {"attn_implementation": "eager"}, 8, False),
        ("Mistral", {"sliding_window": 16}, 16, True),
        ("Mistral", {"sliding_window": 16}, 17, False),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}, 17, True),
        ("Gemma2", {"head_dim": 8}, 8, False),  # its attention caps its logits
        ("Bloom", {}, 8, False),  # its positions are distances that attention adds
        ("Falcon", {"alibi": True}, 8, False),
        ("Mamba", {}, 8, False),
    ],
)
def test_rows_are_joined_only_where_that_is_exact(
    family: str, changes: dict[str, Any], longest: int, expected: bool
) -> None:
    model = model_of(family, None, **changes)
    assert can_pack(model, longest) is expected


def test_where_something_drops_out_every_row_has_its_own_prompt() -> None:
    rows = pairs()
    adapted = make_trainable(model_of("Llama", None), method({**LORA, "dropout": 0.1}, SFT).adapter).train()
    assert drops(adapted.get_base_model())
    assert seen_tokens(adapted, rows) == sum(row.tokens for row in rows)  # and still no padding
    adapted.eval()
    assert not drops(adapted.get_base_model())
    assert seen_tokens(adapted, rows) < sum(row.tokens for row in rows)
    assert drops(model_of("GPT2", None, resid_pdrop=0.1))
    assert not drops(model_of("GPT2", None))
    attends = model_of("Llama", None, attention_dropout=0.5)
    assert drops(attends)
    assert not torch.equal(score_tokens(attends, rows).logp, score_tokens(attends, rows).logp)


def test_what_an_adapter_keeps_over_epochs_is_used_before_prompts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of("Llama", "loreft last"), pairs()
    below = FrozenLayerCache.of(model, [(row.tokens, row.prompt_tokens) for row in rows], 1 << 20)
    assert below
    kept = score_tokens(model, rows, below).logp
    torch.testing.assert_close(kept, score_tokens(model, rows).logp, rtol=1e-5, atol=1e-5)


def test_a_single_row_is_what_the_plain_model_gives(pico_base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_base, dtype=torch.float32)
    ids = list(range(5, 17))
    found = score_tokens(model, [TokenRow(ids, [False] * 4 + [True] * 8, 4)]).logp
    logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    expected = logp[torch.arange(3, 11), torch.tensor(ids[4:])]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
