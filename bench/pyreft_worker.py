"""The anchor of `bench.reft`: trains with pyreft 0.1.0, in the environment that `make pyreft` installs.

Speaks lines of JSON: after the set-up {"ready": true}, then for each line that it reads it trains so many epochs from
the start and answers with the losses and the seconds. It is run by path: that environment has nothing of temper's.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pyreft
import torch
from transformers import AutoModelForCausalLM


def places(prompt: int, positions: str, share: int, layers: int) -> list[list[int]]:
    """Compute the columns that each intervention edits."""
    found: list[list[int]] = pyreft.get_intervention_locations(
        last_position=prompt, positions=positions, num_interventions=layers * share, share_weights=False
    )
    return found


def made(setting: dict[str, Any]) -> Any:
    """Build the model with fresh interventions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(setting["base"], torch_dtype=torch.float32)
    spans = 2 if "+" in setting["positions"] else 1
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": setting["rank"],
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=model.config.hidden_size, low_rank_dimension=setting["rank"], dtype=torch.float32
                ),
            }
            for layer in setting["layers"] * spans
        ]
    )
    reft = pyreft.get_reft_model(model, config)
    reft.disable_model_gradients()
    return reft


def batch_of(setting: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Build a padded batch as pyreft's collator makes it, and the places of every intervention in every row."""
    spans = 2 if "+" in setting["positions"] else 1
    rows = [setting["rows"][n] for n in chosen]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for n, (tokens, prompt) in enumerate(rows):
        ids[n, : len(tokens)] = torch.tensor(tokens)
        labels[n, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        mask[n, : len(tokens)] = 1
    each = [places(prompt, setting["positions"], spans, len(setting["layers"])) for _, prompt in rows]
    units = [[row[number] for row in each] for number in range(len(each[0]))]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "units": units}


def train(setting: dict[str, Any], epochs: int) -> tuple[list[float], float]:
    """Train for `epochs` epochs from the start; return the losses, and the seconds without the set-up."""
    model = made(setting)
    steps = [[batch_of(setting, chosen) for chosen in epoch] for epoch in setting["batches"][:epochs]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses, started = [], time.perf_counter()
    for epoch in steps:
        for batch in epoch:
            _, out = model(
                {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
                unit_locations={"sources->base": (None, batch["units"])},
                labels=batch["labels"],
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
    return losses, time.perf_counter() - started


def main() -> None:
    """Answer requests until the input ends."""
    with open(sys.argv[1]) as file:
        settings = json.load(file)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        losses, seconds = train(settings[asked["setting"]], asked["epochs"])
        print(json.dumps({"losses": losses, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
