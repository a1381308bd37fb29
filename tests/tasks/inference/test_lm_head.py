"""What models make of hidden states, against their own whole forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.inference.lm_head import head_of, logits_of
from tasks.inference.logprobs import score_hidden
from tasks.tokenization.baichuan import UnitHead

SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[float, float | None] | None]] = {
    "Llama": ({}, (1.0, None)),
    "Mistral": ({}, (1.0, None)),
    "Qwen2": ({}, (1.0, None)),
    "Qwen3": ({}, (1.0, None)),
    "Mixtral": ({"num_local_experts": 2, "experts_implementation": "eager"}, (1.0, None)),
    "Phi": ({}, (1.0, None)),
    "GPT2": ({"n_embd": 32, "n_head": 2, "n_layer": 1}, (1.0, None)),
    "GPTJ": ({"n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 4}, (1.0, None)),
    "GPTNeoX": ({}, (1.0, None)),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, (1.0, None)),
    "Bloom": ({}, (1.0, None)),
    "Falcon": ({}, (1.0, None)),
    "Gemma2": ({"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "Cohere": ({"logit_scale": 0.25}, (0.25, None)),
    "Granite": ({"logits_scaling": 4.0}, (0.25, None)),
    "Roberta": ({"is_decoder": True}, None),  # a layer between the last hidden states and the head
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    changes = {**SMALL, **FAMILIES[family][0]}
    config = getattr(transformers, f"{family}Config")(**changes)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def hidden_and_logits(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of seven tokens of a row, and what could be trained there."""
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        return hidden, model(input_ids=ids).logits[0], torch.arange(20, 27)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_its_own_forward_pass_has_it(family: str) -> None:
    model = model_of(family)
    hidden, logits, targets = hidden_and_logits(model)
    form, head = FAMILIES[family][1], head_of(model)
    assert (head and (head.scale, head.cap)) == form
    found = score_hidden(model, hidden, targets, with_mean=True)
    torch.testing.assert_close(found.logp, -F.cross_entropy(logits, targets, reduction="none"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean_logp, F.log_softmax(logits, 1).mean(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits_of(model, hidden), logits, rtol=1e-9, atol=1e-9)


def adapted(model: Any) -> Any:
    found = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    return found.double().eval()


def copied(model: Any) -> Any:
    return (
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).double().eval()
    )


def of_unit_length(model: Any) -> Any:
    model.lm_head = UnitHead(32, 90, bias=False).double()
    return model


def hooked(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def tempered(model: Any) -> Any:
    """A model that does something of its own with its logits."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output: Any = super().forward(*args, **kwargs)
            output.logits = output.logits.abs()
            return output

    model.__class__ = Odd
    return model


@pytest.mark.parametrize("change", [adapted, copied, of_unit_length, hooked, tempered])
def test_a_head_that_is_more_than_a_matrix_is_called_as_it_is(change: Any) -> None:
    model = change(model_of("Llama"))
    assert head_of(model) is None
    hidden, logits, targets = hidden_and_logits(model)
    hidden.requires_grad_()
    found = score_hidden(model, hidden, targets, with_mean=True)
    torch.testing.assert_close(found.logp, -F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(found.mean_logp, F.log_softmax(logits, 1).mean(1))
    found.logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("Llama")
    before = list(model.modules())
    hidden, _, targets = hidden_and_logits(model)
    score_hidden(model, hidden, targets)
    with pytest.raises(RuntimeError):
        logits_of(model, hidden[:, :3])
    assert [id(module) for module in model.modules()] == [id(module) for module in before]


def test_an_adapter_elsewhere_leaves_the_head_plain() -> None:
    model = get_peft_model(model_of("Llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    head = head_of(model)
    assert head
    assert head.weight is model.get_output_embeddings().weight
