"""Times LoReFT training against pyreft 0.1.0, step by step on the same tokens, and compares the losses.

    make pyreft
    .venv/bin/python -m bench.reft [--rounds 5] [--epochs 9] [--layers 12] [--hidden 384]

Both train the same fresh edits of the same random Llama in float32, with AdamW, 200 rows in batches of 8, prompts three
times as long as replies. Anchors: batches in no order ("default") and grouped by length as ours are ("tuned"). pyreft
is driven by its own model, without its Trainer, which fails on transformers 5. Its environment is another one, so it
runs in a process of its own, which waits while ours works. What counts is the time of all epochs, filling of caches
included. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.clock import ROOT, Ratio, machine
from tasks.core.stage import quiet_libraries
from tasks.train.batching import batches_of

THEIRS = ROOT / ".venv-pyreft" / "bin" / "python"
RANK = 4
BATCH_ROWS = 8


def write_base(folder: Path, layers: int, hidden: int) -> None:
    """Write a random Llama that both versions of transformers can read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)  # what ours loads, whatever the machine


def rows_of(count: int) -> list[tuple[list[int], int]]:
    """Token ids and the length of the prompt."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        reply = draw.randint(16, 48)
        found.append(([draw.randrange(3, 8192) for _ in range(4 * reply)], 3 * reply))
    return found


def as_shuffled(rows: int, epoch: int) -> list[list[int]]:
    """Build batches in no order of length, as pyreft's own loader makes them."""
    order = list(range(rows))
    random.Random(epoch).shuffle(order)
    return [order[start : start + BATCH_ROWS] for start in range(0, rows, BATCH_ROWS)]


def ours(setting: dict[str, Any], epochs: int) -> tuple[list[float], float]:
    """Run what the stage `train` does at each step, with the same batches as theirs."""
    import torch

    from tasks.adapters.attach import init_adapter
    from tasks.adapters.params import ReftAdapter
    from tasks.inference.frozen_layer_cache import FrozenLayerCache
    from tasks.inference.logprobs import score_tokens
    from tasks.inference.rows import TokenRow
    from tasks.train.objectives import sft_loss

    torch.manual_seed(0)
    adapter = ReftAdapter(
        name="loreft",
        rank=setting["rank"],
        layers=setting["layers"],
        component="block_output",
        positions=setting["positions"],
        share_weights=False,
        bias=True,
        dropout=0.0,
        cache_mib=1024,
    )
    model = init_adapter(Path(setting["base"]), adapter).float().train()
    _draw_as_they_do(model, setting)
    rows = [TokenRow(ids, [n >= prompt for n in range(len(ids))], prompt) for ids, prompt in setting["rows"]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses, started = [], time.perf_counter()
    shapes = [(len(row.ids), row.prompt_tokens) for row in rows]
    below = FrozenLayerCache.of(model, shapes, adapter.cache_mib << 20) if epochs > 1 else None
    for epoch in range(epochs):
        for batch in setting["batches"][epoch]:
            loss = sft_loss(score_tokens(model, [rows[n] for n in batch], below).logp)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, time.perf_counter() - started


def _draw_as_they_do(model: Any, setting: dict[str, Any]) -> None:
    """Draw the same first values as pyreft: a rotation, its completion, and the source, edit after edit."""
    import torch
    from torch import nn

    from tasks.adapters.reft.pyreft_format import edits_of

    torch.manual_seed(0)
    for _, _, edit in sorted(edits_of(model), key=lambda each: (each[1], each[0])):
        rotation = nn.init.orthogonal_(torch.empty(edit.hidden_size, setting["rank"]))
        completion = torch.randn(edit.hidden_size, edit.hidden_size - setting["rank"])
        edit.directions.set(rotation.mT.contiguous(), torch.cat([rotation, completion], dim=1))
        edit.source.load_state_dict(nn.Linear(edit.hidden_size, setting["rank"]).state_dict())


class Theirs:
    """The other process."""

    def __init__(self, settings: Path) -> None:
        self.process = subprocess.Popen(
            [THEIRS, ROOT / "bench" / "pyreft_worker.py", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
        )
        self._answer()

    def __call__(self, setting: str, epochs: int) -> tuple[list[float], float]:
        """Train in pyreft's own process; return losses and seconds."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"setting": setting, "epochs": epochs}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["losses"], answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("the other process ended; run `make pyreft` first")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=384)
    given = parser.parse_args()
    if not THEIRS.exists():
        raise SystemExit(f"there is no {THEIRS}; run `make pyreft` first")
    quiet_libraries()
    import torch

    torch.set_flush_denormal(True)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", given.layers, given.hidden)
        common: dict[str, Any] = {"base": str(folder / "base"), "rank": RANK, "rows": rows_of(given.rows)}
        lengths = [len(ids) for ids, _ in common["rows"]]
        grouped = [batches_of(epoch, lengths, BATCH_ROWS, 0) for epoch in range(given.epochs)]
        shuffled = [as_shuffled(given.rows, epoch) for epoch in range(given.epochs)]
        settings = {
            f"{what}, {anchor}": common | {"layers": layers, "positions": positions, "batches": batches}
            for what, layers, positions in (
                ("middle layer, last", [given.layers // 2], "l1"),
                ("all layers, f5+l5", list(range(given.layers)), "f5+l5"),
            )
            for anchor, batches in (("default", shuffled), ("tuned", grouped))
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        theirs = Theirs(folder / "settings.json")
        lines = []
        for label, setting in settings.items():
            epochs = given.epochs if "middle" in label else max(1, given.epochs // 9)
            mine = setting | {"batches": grouped}  # what the stage does, whatever the anchor has
            if "tuned" in label:
                pairs = zip(ours(mine, 1)[0], theirs(label, 1)[0], strict=True)
                print(f"{label}: losses differ by at most {max(abs(a - b) / abs(b) for a, b in pairs):.1e}, relatively")
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(given.rounds):
                for which in (0, 1) if number % 2 else (1, 0):
                    times[which].append((theirs(label, epochs) if which else ours(mine, epochs))[1])
            ratio = Ratio([b / a for a, b in zip(*times, strict=True)], *times)
            lines.append(f"| {label}, {epochs} epochs | {ratio.row()} |")
            print(lines[-1], flush=True)
            if "tuned" in label:
                again = [ours(mine, 1)[1] for _ in range(2)]
                print(f"{label}: ours against ours {again[0] / again[1]:.2f}")
    print("\n| setting | ratio, median | least | 90% interval | ours s | theirs s |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
