"""Fold an adapter into the base model, where that is possible, and measure that nothing was lost.

Reads:  data/base/, data/adapters/METHOD/, held-out rows of data/rendered/ as probes.
Writes: data/models/METHOD/: a model folder; equivalence.json. What cannot be merged (ReFT edits depend on the input) is
        packaged instead: `adapter/`, and reference.json, which names the base. data/exports/METHOD/: further forms.
Params: merge, train.METHOD, train_defaults (their adapter)
Fails:  a merged model that differs from the adapter model by more than merge.max_mean_kl (65, never retried); the hub
        does not answer (75, retried).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.attach import is_mergeable, load_adapted, load_packaged
from tasks.adapters.package import package
from tasks.adapters.params import Adapted
from tasks.core.artifacts import as_json, atomic_folder, read_manifest
from tasks.core.errors import NotEquivalent
from tasks.core.layout import EQUIVALENCE
from tasks.core.stage import run_stage
from tasks.deltas.lazy_tensors import ComputedTensor
from tasks.deltas.weight_deltas import name_in
from tasks.inference.rendered_rows import read_questions
from tasks.merge.export.formats import export
from tasks.merge.merged_model import DEQUANTIZED, ORIGINAL, merge, write_merged
from tasks.merge.params import Merge
from tasks.models.device import host_read, seed_everything, upload
from tasks.models.loader import Model
from tasks.models.quantization import dequantized
from tasks.models.safetensors_reader import MIB, TensorSource, stored_in
from tasks.tokenization.architecture import architecture_in

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(NamedTuple):
    """Divergence of two models: KL(first || second) per token, in nats, and the largest difference of any logit."""

    mean_kl: float
    max_logit_difference: float
    tokens: int


PROBES: Mapping[str, Mapping[str, str]] = {
    "chat": {"input_ids": "ids"},
    "pair": {"input_ids": "input_ids", "labels": "target_ids"},
}
"""What the models are given of a held-out row, by its kind: an argument of theirs, and the column that it is."""


def logits_on(model: Model, probe: Mapping[str, Sequence[int]]) -> Tensor:
    """Compute the logits at every token that a model writes or reads on of a probe, (tokens, vocabulary), float32."""
    import torch

    written = len(probe.get("labels", probe["input_ids"]))  # a soft prompt's own positions come before these
    given = {name: upload([list(ids)], model.device) for name, ids in probe.items()}
    with torch.no_grad(), host_read("whether rows are padded"):
        logits: Tensor = model(**given).logits[0, -written:].float()
    return logits


def kl_divergence(first: Model, second: Model, probes: Sequence[Mapping[str, Sequence[int]]]) -> Divergence:
    """Compare the next-token distributions of two models on some probes.

    The vocabulary of the second may be longer; what it has more is left out.
    """
    import torch

    kl, largest, tokens = 0.0, 0.0, 0
    for probe in probes:
        one = logits_on(first, probe)
        two = logits_on(second, probe)[:, : one.shape[1]]
        log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
        both = torch.stack([(log_p.exp() * (log_p - log_q)).sum(), (one - two).abs().max()])
        with host_read("how far two models are apart on a probe"):
            of_probe, difference = both.tolist()
        kl, largest = kl + of_probe, max(largest, difference)
        tokens += len(one)
    return Divergence(kl / tokens, largest, tokens)


def base_candidates(model: Model, base: Path, onto: str) -> dict[str, Mapping[str, TensorSource]]:
    """Build the weights that an update may be added to, by name; of each, what stands in for the base's own.

    Args:
        model: the adapter model in the form in which it was trained.
        base: the folder of its base.
        onto: of merge.onto.
    """
    stored = stored_in(base)
    made = {name_in(stored, name) or name: make for name, make in dequantized(model).items()}
    weights = {name: ComputedTensor(make, stored[name].shape) for name, make in made.items()}
    both: dict[str, Mapping[str, TensorSource]] = {ORIGINAL: {}, DEQUANTIZED: weights}
    if not weights:
        return {ORIGINAL: {}}
    return both if onto == "closest" else {onto: both[onto]}


def merge_closest(
    base: Path,
    trained: Path,
    model: Model,
    probes: Sequence[Mapping[str, Sequence[int]]],
    folder: Path,
    *,
    onto: str,
    most_bytes: int,
    dtype: str = "own",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write a merged model into an empty folder: of the possible ones the closest to what was trained.

    All are written in one pass over the base and compared with the adapter model on the probes.

    Returns:
        The content of its equivalence.json, and the digests of its files.
    """
    made = {
        folder / name: merge(base, trained, dtype, weights)
        for name, weights in base_candidates(model, base, onto).items()
    }
    for place in made:
        place.mkdir()
    digests = write_merged(base, trained, made, most_bytes)
    found = {place: kl_divergence(model, load_packaged(place), probes) for place in made}
    best = min(found, key=lambda place: (found[place].mean_kl, place.name))
    for file in sorted(best.iterdir()):
        file.rename(folder / file.name)
    for place in made:
        shutil.rmtree(place)
    told = {place.name: each._asdict() for place, each in found.items()}
    return {"form": f"merged onto the {best.name} weights", **found[best]._asdict(), "onto": told}, digests[best]


def check_equivalent(told: Mapping[str, Any], max_mean_kl: float, where: str) -> None:
    """Refuse a model that is too far from the one that was trained.

    Raises:
        NotEquivalent: the mean KL is above the bound, or not a number.
    """
    if not told["mean_kl"] <= max_mean_kl:
        raise NotEquivalent(
            "the merged model is not the model that was trained",
            where=where,
            got=f"mean KL {told['mean_kl']:.2e} nats per token",
            expected=f"at most merge.max_mean_kl = {max_mean_kl:g}",
            fix="set merge.onto to closest, or raise merge.max_mean_kl if you accept the difference",
        )


def main() -> None:
    """Run the stage `merge@METHOD`."""
    with run_stage(__doc__, "base", "adapter", "rendered", "out", "exports", item="method", may_fetch=True) as stage:
        params = stage.section("merge", Merge)
        adapter = stage.section(f"train.{stage.item}", Adapted).adapter
        base, trained = stage.path("base"), stage.path("adapter")
        for folder in (base, trained):
            read_manifest(folder)
        seed_everything(0)
        architecture = architecture_in(base)
        rows = read_questions(stage.path("rendered"), architecture)[: params.probe_examples]
        probes = [{name: row[column] for name, column in PROBES[architecture.rows].items()} for row in rows]
        model = load_adapted(base, trained, adapter)
        known: dict[str, str] = {}
        with atomic_folder(stage.path("out"), known=known) as folder:
            if is_mergeable(adapter):
                most_bytes = params.max_shard_mib * MIB
                told, digests = merge_closest(
                    base, trained, model, probes, folder, onto=params.onto, most_bytes=most_bytes
                )
                known |= digests
            else:
                package(base, trained, folder, stage.path("out"))
                form = f"packaged: adapter and reference to the base, because {adapter.name} cannot be added to weights"
                told = {"form": form, **kl_divergence(model, load_packaged(folder, base), probes)._asdict()}
            (folder / EQUIVALENCE).write_text(as_json(told))
            for name, each in told.get("onto", {}).items():
                print(f"merge {stage.item}: onto the {name} weights: mean KL {each['mean_kl']:.2e}", flush=True)
            print(
                f"merge {stage.item}: {told['form']}; mean KL {told['mean_kl']:.2e}, "
                f"largest logit difference {told['max_logit_difference']:.3g}",
                flush=True,
            )
            check_equivalent(told, params.max_mean_kl, stage.item)
        with atomic_folder(stage.path("exports")) as folder:
            for number, wanted in enumerate(params.exports):
                export(stage.path("out"), wanted, folder / f"{number}-{wanted.kind}")
