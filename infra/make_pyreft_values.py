"""Writes what pyreft gives, for tests/tasks/adapters/reft/test_reft.py to compare with where no other values are.

    make pyreft
    .venv-pyreft/bin/python infra/make_pyreft_values.py

The file holds a random Llama, a checkpoint of LoReFT at the first two and the last two prompt tokens of two layers, its
logits before and after twenty steps, and the losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyreft
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parent.parent / "tests" / "tasks" / "adapters" / "pyreft.safetensors"
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LAYERS, POSITIONS, RANK, PROMPT, SEED = [0, 2], "f2+l2", 2, 6, 7


def main() -> int:
    """Write the file."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    ids = torch.randint(0, 32, (2, 10))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    tensors = {f"base.{name}": p.detach().clone() for name, p in base.named_parameters()}
    torch.manual_seed(SEED)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(embed_dim=16, low_rank_dimension=RANK, dtype=torch.float32),
        }
        for layer in LAYERS * 2
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    model.disable_model_gradients()
    with TemporaryDirectory() as folder:
        model.save(f"{folder}/checkpoint")
        config = json.loads(Path(f"{folder}/checkpoint/config.json").read_text())
        for path in Path(f"{folder}/checkpoint").glob("*.bin"):
            stored = torch.load(path, weights_only=True)
            tensors |= {f"checkpoint/{path.name}/{name}": tensor.clone() for name, tensor in stored.items()}
    each = pyreft.get_intervention_locations(
        last_position=PROMPT, positions=POSITIONS, num_interventions=2 * len(LAYERS), share_weights=False
    )
    units = [[places] * len(ids) for places in each]

    def run() -> Any:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model(inputs, unit_locations={"sources->base": (None, units)}, labels=labels)[1]

    tensors |= {"ids": ids, "labels": labels, "logits": run().logits.detach()}
    # with a large eps: else coordinates whose gradient is rounding alone move by the whole learning rate, either way
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = run().loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors["logits_after"] = run().logits.detach()
    about = {"config": json.dumps(config), "losses": json.dumps(losses), "positions": POSITIONS, "seed": str(SEED)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT, metadata=about)
    print(OUT, OUT.stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
