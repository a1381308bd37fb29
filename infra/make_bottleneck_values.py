"""Writes what the AdapterHub library gives, for tests/tasks/adapters/test_bottleneck.py to compare with.

    python -m venv .venv-adapterhub
    .venv-adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0
    .venv-adapterhub/bin/python infra/make_bottleneck_values.py

That library asks for an older transformers, so it has an environment of its own. The file holds a random Llama, the
bottlenecks' weights for each form, and the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parent.parent / "tests" / "tasks" / "adapters" / "bottleneck.safetensors"
FORMS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="swish"),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, non_linearity="relu"),
    "parallel": adapters.ParBnConfig(reduction_factor=2, non_linearity="relu", scaling=4.0),
}
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def main() -> int:
    """Write the file."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    ids = torch.randint(0, 32, (2, 7))
    tensors = {f"base.{name}": p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {"ids": ids, "base_logits": model(input_ids=ids).logits.detach()}
    adapters.init(model)
    for form, config in FORMS.items():
        model.add_adapter(form, config=config)
        own = {name: p for name, p in model.named_parameters() if f".{form}." in name}
        with torch.no_grad():
            for parameter in own.values():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        model.set_active_adapters(form)
        tensors |= {f"{form}.{name.replace(f'.{form}.', '.')}": p.detach().clone() for name, p in own.items()}
        tensors[f"{form}_logits"] = model(input_ids=ids).logits.detach()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT)
    print(OUT, OUT.stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
