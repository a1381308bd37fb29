"""Folds an adapter into the base model, where that is possible, and measures that nothing was lost.

Reads:  data/base/, data/adapters/METHOD/, held-out rows of data/rendered/ as probes.
Writes: data/models/METHOD/: a model folder; equivalence.json. What cannot be merged (ReFT edits depend on the input) is
        packaged instead: the base's files and `adapter/`.
Params: merge, train.METHOD.adapter
Fails:  a merged model that differs from the adapter model by more than merge.max_mean_kl (65, never retried).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks import process
from tasks.adapted import CONFIG, FOLDER, WEIGHTS, load_adapted, load_packaged, mergeable
from tasks.architecture import architecture_in
from tasks.device import settle
from tasks.errors import BadModel, NotEquivalent
from tasks.models import Model, model_files
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.tables import read_rows

if TYPE_CHECKING:
    from torch import Tensor

EQUIVALENCE = "equivalence.json"


class Difference(NamedTuple):
    """How far two models are apart: KL(first || second) per token, in nats, and the largest difference of any logit."""

    mean_kl: float
    max_logit_difference: float
    tokens: int


def lora_updates(adapter: Path) -> dict[str, Tensor]:
    """What a LoRA adapter adds to each weight, float32, by the weight's name in the base.

    That is alpha / rank * B A, and alpha / sqrt(rank) * B A for rank-stabilised LoRA (arXiv:2312.03732).
    """
    from safetensors.torch import load_file

    config = json.loads((adapter / CONFIG).read_text())
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("fan_in_fan_out"):
        raise BadModel(
            "is of a LoRA variant that is not merged yet", where=str(adapter / CONFIG), expected="LoRA, rsLoRA or DoRA"
        )
    tensors = load_file(adapter / WEIGHTS)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    updates = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[f"{module}.weight"] = scale * (b.float() @ a.float())
    return updates


def dora_norms(adapter: Path) -> dict[str, Tensor]:
    """The norm that a DoRA adapter (arXiv:2402.09353) gives each row of a weight, float32, by its name in the base."""
    from safetensors.torch import load_file

    mark = ".lora_magnitude_vector"
    return {
        f"{name.removeprefix('base_model.model.').removesuffix(mark)}.weight": tensor.float()
        for name, tensor in load_file(adapter / WEIGHTS).items()
        if name.endswith(mark)
    }


def merge_shards(
    base: Path,
    updates: Mapping[str, Tensor],
    replaced: Mapping[str, Tensor],
    out: Path,
    norms: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the base's weights plus the updates, shard by shard; each sum is made in float32 and rounded once.

    Args:
        base: a model folder.
        updates: float32 tensors to add, by weight name.
        replaced: float32 tensors that stand in for the base's own before the sum.
        out: the folder that gets shards of the same names.
        norms: what each row of a sum is scaled to, by weight name; of DoRA.

    Raises:
        BadModel: an update has no weight in the base.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    unused = set(updates)
    for shard in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  # not a mapping
                weight = source.get_tensor(name)
                if name in updates or name in replaced:
                    total = replaced.get(name, weight).float()
                    total = total + updates[name] if name in updates else total
                    if norms and name in norms:
                        total = total * (norms[name] / total.norm(dim=1))[:, None]
                    weight = total.to(weight.dtype)
                    unused.discard(name)
                tensors[name] = weight
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if unused:
        raise BadModel("has no such weights to add the adapter to", where=str(base), examples=sorted(unused))


def dequantized(model: Model) -> dict[str, Tensor]:
    """What the 4-bit weights of a model stand for, float32, by their name in the base."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            weights[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state).float().cpu()
    return weights


PROBES: Mapping[str, Mapping[str, str]] = {
    "chat": {"input_ids": "ids"},
    "pair": {"input_ids": "input_ids", "labels": "target_ids"},
}
"""What the models are given of a held-out row, by its kind: an argument of theirs, and the column that it is."""


def difference(first: Model, second: Model, probes: Sequence[Mapping[str, Sequence[int]]]) -> Difference:
    """Compares the next-token distributions of two models at every token that they write or read on of some probes."""
    import torch

    kl, largest, tokens = 0.0, 0.0, 0
    for probe in probes:
        written = len(probe.get("labels", probe["input_ids"]))  # a learnt prompt's own positions come before these
        given = {name: torch.tensor([list(ids)], device=first.device) for name, ids in probe.items()}
        with torch.no_grad():
            one, two = (model(**given).logits[:, -written:].float() for model in (first, second))
        log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        largest = max(largest, (one - two).abs().max().item())
        tokens += written
    return Difference(kl / tokens, largest, tokens)


def main() -> None:
    """The stage `merge@METHOD`."""
    with process.stage(__doc__, "base", "adapter", "rendered", "out", item="method") as stage:
        params, adapter = stage.params.merge, stage.params.train[stage.item].adapter
        base, trained = stage.path("base"), stage.path("adapter")
        for folder in (base, trained):
            read_manifest(folder)
        settle(0)
        kind = architecture_in(base).rows
        rows = read_rows(stage.path("rendered") / "held_out" / f"{kind}.parquet")[: params.probe_rows]
        probes = [{name: row[column] for name, column in PROBES[kind].items()} for row in rows]
        model = load_adapted(base, trained, adapter)
        with whole_folder(stage.path("out")) as folder:
            for file in model_files(base):
                if file.suffix != ".safetensors" or not mergeable(adapter):
                    shutil.copyfile(file, folder / file.name)
            if not mergeable(adapter):
                form = f"packaged: the base and the adapter, because {adapter.name} cannot be added to weights"
                (folder / FOLDER).mkdir()
                for name in (CONFIG, WEIGHTS):
                    shutil.copyfile(trained / name, folder / FOLDER / name)
            else:
                form = f"merged onto the {params.onto} weights"
                replaced = dequantized(model) if params.onto == "dequantized" else {}
                merge_shards(base, lora_updates(trained), replaced, folder, dora_norms(trained))
            found = difference(model, load_packaged(folder), probes)
            (folder / EQUIVALENCE).write_text(as_json({"form": form, **found._asdict()}))
            print(
                f"merge {stage.item}: {form}; mean KL {found.mean_kl:.2e}, "
                f"largest logit difference {found.max_logit_difference:.3g}",
                flush=True,
            )
            if not found.mean_kl <= params.max_mean_kl:
                raise NotEquivalent(
                    "the merged model is not the model that was trained",
                    where=stage.item,
                    got=f"mean KL {found.mean_kl:.2e} nats per token",
                    expected=f"at most merge.max_mean_kl = {params.max_mean_kl:g}",
                    fix="set merge.onto to dequantized, or raise merge.max_mean_kl if you accept the difference",
                )


if __name__ == "__main__":
    main()
