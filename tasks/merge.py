"""Folds an adapter into the base model, where that is possible, and measures that nothing was lost.

Reads:  data/base/, data/adapters/METHOD/, held-out rows of data/rendered/ as probes.
Writes: data/models/METHOD/: a model folder; equivalence.json. What cannot be merged (ReFT edits depend on the input) is
        packaged instead: the base's files and `adapter/`.
Params: merge, train.METHOD.adapter
Fails:  a merged model that differs from the adapter model by more than merge.max_mean_kl (65, never retried).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks import process
from tasks.adapted import FOLDER, load_adapted, load_packaged, mergeable
from tasks.adapter_files import PUBLISHED
from tasks.architecture import architecture_in
from tasks.device import settle
from tasks.errors import BadModel, NotEquivalent
from tasks.models import Model, model_files
from tasks.outputs import as_json, read_manifest, whole_folder
from tasks.quantized import dequantized
from tasks.scoring import read_questions
from tasks.updates import Change, changes_of

if TYPE_CHECKING:
    from torch import Tensor

EQUIVALENCE = "equivalence.json"


class Difference(NamedTuple):
    """How far two models are apart: KL(first || second) per token, in nats, and the largest difference of any logit."""

    mean_kl: float
    max_logit_difference: float
    tokens: int


def merge_shards(
    base: Path,
    changes: Mapping[str, Change],
    replaced: Mapping[str, Tensor],
    out: Path,
    copies: Mapping[str, str] | None = None,
) -> None:
    """Writes the base's weights with their changes, shard by shard; each is made in float32 and rounded once.

    Args:
        base: a model folder.
        changes: what becomes of weights, by name.
        replaced: float32 tensors that stand in for the base's own before that.
        out: the folder that gets shards of the same names.
        copies: weights that the base does not have, by the name of the one of which they are an unchanged copy.

    Raises:
        BadModel: a change has no weight in the base.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    copies = copies or {}
    unused = {name for name in changes if name.endswith(".weight")}  # there need not be a bias
    for shard in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  # not a mapping
                tensors[name] = weight = source.get_tensor(name)
                tensors |= {copy: weight.clone() for copy, of in copies.items() if of == name}
                if name in changes or name in replaced:
                    total = replaced.get(name, weight).float()
                    total = changes[name](total) if name in changes else total
                    tensors[name] = total.to(weight.dtype).contiguous()
                    unused.discard(name)
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if unused:
        raise BadModel("has no such weights to add the adapter to", where=str(base), examples=sorted(unused))


def untie(model: Model, changes: Mapping[str, Change], folder: Path) -> dict[str, str]:
    """Gives a merged model a head of its own where it was tied to an embedding that the adapter changes.

    The adapter changes what tokens are read as, not what the head compares with.

    Returns:
        For `merge_shards`: the head's weight, and which one it is a copy of; empty where nothing has to be untied.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):  # all weights were trained, the head's with the embedding's
        return {}
    named = {id(module): name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    embedding, head = (
        f"{named[id(module)].removesuffix('.base_layer')}.weight"
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if embedding not in changes or not model.config.tie_word_embeddings:
        return {}
    path, index = folder / "config.json", folder / "model.safetensors.index.json"
    path.write_text(as_json({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    if index.is_file():
        known = json.loads(index.read_text())
        known["weight_map"][head] = known["weight_map"][embedding]
        index.write_text(as_json(known))
    return {head: embedding}


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
        architecture = architecture_in(base)
        rows = read_questions(stage.path("rendered"), architecture)[: params.probe_rows]
        probes = [{name: row[column] for name, column in PROBES[architecture.rows].items()} for row in rows]
        model = load_adapted(base, trained, adapter)
        with whole_folder(stage.path("out")) as folder:
            for file in model_files(base):
                if file.suffix != ".safetensors" or not mergeable(adapter):
                    shutil.copyfile(file, folder / file.name)
            if not mergeable(adapter):
                form = f"packaged: the base and the adapter, because {adapter.name} cannot be added to weights"
                (folder / FOLDER).mkdir()
                for name in PUBLISHED:
                    shutil.copyfile(trained / name, folder / FOLDER / name)
            else:
                form = f"merged onto the {params.onto} weights"
                changes = changes_of(trained)
                replaced = dequantized(model) if params.onto == "dequantized" else {}
                merge_shards(base, changes, replaced, folder, untie(model, changes, folder))
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
