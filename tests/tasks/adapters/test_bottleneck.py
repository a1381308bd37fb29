from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.adapters.bottleneck import BOTTLENECK_FORMS, BottleneckConfig
from tests.tasks.adapters.reft.test_reft import DECODERS, pico_model

VALUES = Path(__file__).with_name("bottleneck.safetensors")
"""What the AdapterHub library gave; infra/make_bottleneck_values.py wrote it."""

SETTINGS: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction_factor": 4.0, "non_linearity": "silu"},
    "pfeiffer": {"reduction_factor": 4.0, "non_linearity": "relu"},
    "parallel": {"reduction_factor": 2.0, "non_linearity": "relu", "scaling": 4.0},
}
PLACES = {
    "houlsby": {"self_attn.": "attention_adapters", "mlp.": "output_adapters"},
    "pfeiffer": {"": "output_adapters"},
    "parallel": {"mlp.": "output_adapters"},
}


def adapted(model: Any, form: str, **changes: Any) -> Any:
    config = BottleneckConfig(form=form, task_type="CAUSAL_LM", **{**SETTINGS[form], **changes})
    return get_peft_model(model, config).eval()


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_on_copied_weights_it_gives_what_adapterhub_gives(form: str) -> None:
    values = load_file(VALUES)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    for name, parameter in base.named_parameters():
        parameter.copy_(values[f"base.{name}"])
    torch.testing.assert_close(base.eval()(input_ids=values["ids"]).logits, values["base_logits"], rtol=0, atol=1e-4)
    model = adapted(base, form)
    state: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for layer in (0, 1):
        for ours, theirs in PLACES[form].items():
            for own, other in (("down", "adapter_down.0"), ("up", "adapter_up")):
                for part in ("weight", "bias"):
                    key = (
                        f"base_model.model.model.layers.{layer}.{ours}bottleneck.bottleneck_parts.default.{own}.{part}"
                    )
                    state.pop(key).copy_(values[f"{form}.model.layers.{layer}.{theirs}.adapters.{other}.{part}"])
    assert not state
    found = model(input_ids=values["ids"]).logits
    torch.testing.assert_close(found, values[f"{form}_logits"], rtol=1e-4, atol=1e-4)
    assert (found - values["base_logits"]).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
def test_a_fresh_one_changes_nothing_and_a_trained_one_something(kind: str, form: str) -> None:
    if form == "parallel" and kind in ("falcon", "olmo2"):  # no norm of its own before the MLP
        with pytest.raises(ValueError, match="no norm of a known name"):
            adapted(pico_model(kind), form)
        return
    inputs = {"input_ids": torch.arange(1, 9)[None]} | (
        {"decoder_input_ids": torch.arange(4)[None]} if kind == "t5" else {}
    )
    plain = pico_model(kind)(**inputs).logits
    model = adapted(pico_model(kind), form)
    assert torch.equal(model(**inputs).logits, plain)
    after = moved(model)(**inputs).logits
    assert (after - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.unload()(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_saved_and_loaded_by_peft_alone_it_gives_the_same_bits(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ids = torch.arange(1, 9)[None]
    model = moved(adapted(pico_model().to(dtype), form, layers=[0, 2]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico_model().to(dtype), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("form", BOTTLENECK_FORMS)
def test_checkpointed_layers_have_the_gradients_of_plain_ones(form: str) -> None:
    ids = torch.arange(1, 17).view(2, 8)
    gradients = []
    for checkpointed in (False, True):
        model = moved(adapted(pico_model(), form)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"form": "nothing"}, "expected one of houlsby"),
        ({"non_linearity": "nothing"}, "non_linearity"),
        ({"reduction_factor": 0.0}, "expected more than 0"),
        ({"layers": [7]}, "expected 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(pico_model(), BottleneckConfig(**changes))
