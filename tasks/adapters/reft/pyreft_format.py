"""Checkpoints of pyreft 0.1.0, read and written: a `config.json`, and one `.bin` for each intervention.

Such a folder does not say which positions are edited; pyreft's own training script writes them into an `args.json`
beside it. Tensors are read with `weights_only=True`, so that no file can run code.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tasks.adapters.hooks import COMPONENTS, layers_of
from tasks.adapters.positions import parse_positions
from tasks.adapters.reft.interventions import INTERVENTIONS, Edit, Rotation
from tasks.adapters.reft.tuner import ReftConfig, ReftLayer
from tasks.core.errors import BadModel

_KEY = re.compile(r"layer_(\d+)_comp_(block_output|attention_output|mlp_output)_unit_pos_nunit_1#(\d)")
_TYPES = {
    name: f"{spelt}Intervention"
    for name, spelt in zip(
        INTERVENTIONS, ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft"), strict=True
    )
}
_FIELDS = 14
"""So many has a representation in pyvene's configuration; the first five are said here, the others are null."""


class PyreftCheckpoint(NamedTuple):
    """One intervention of a folder: its layer, which of the layer's it is, and its tensors."""

    layer: int
    number: int
    state: Mapping[str, Any]


def from_pyreft(
    base_model: nn.Module, folder: str | Path, *, positions: str | None = None, seed: int | None = None
) -> PeftModel:
    """Load the edits of a pyreft checkpoint into a model.

    Args:
        base_model: the model that they were trained on.
        folder: with `config.json` and the `.bin` files.
        positions: `last`, `fN`, `lN` or `fN+lM`; None takes them from a JSON file in the folder or beside it, and
            without one `last`.
        seed: pyreft completes the rotations of LoReFT to square matrices at random, on which the path of a further
            training depends, and does not store that: it is drawn as pyreft would after `torch.manual_seed(seed)`. None
            takes the seed that the rotations themselves were drawn under, where one below a hundred is it, else 0.

    Raises:
        BadModel: it is no such checkpoint, does not fit the model, or does not state the positions.
    """
    folder = Path(folder)
    kind, component, stored = _read(folder)
    beside = _args(folder)
    count = 1 + max(each.number for each in stored)
    positions = positions or beside.get("positions") or beside.get("position") or ("last" if count == 1 else None)
    if positions is None or (count == 2 and len(parse_positions(positions).names) != 2):
        raise BadModel(
            "does not say which positions it edits",
            where=str(folder),
            got=f"{count} edits in a layer, positions {positions}",
            fix="say them: from_pyreft(base_model, folder, positions='f7+l7')",
        )
    first = stored[0].state
    rank = int((first["weight"] if "weight" in first else _source(first)).shape[0])
    config = ReftConfig(
        intervention=kind,
        r=rank,
        layers=sorted({each.layer for each in stored}),
        component=component,
        positions=positions,
        share_weights=count == 1 and len(parse_positions(positions).names) == 2,
        projection_bias=first.get("proj_layer.bias") is not None,
        task_type="CAUSAL_LM",
    )
    try:
        model = cast("PeftModel", get_peft_model(base_model, config))
    except ValueError as error:
        raise BadModel("does not fit this model", where=str(folder), got=str(error)) from error
    edits = {(layer, number): edit for layer, number, edit in edits_of(model)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(first) if seed is None else seed)
        for each in stored:
            try:
                _fill(edits[each.layer, each.number], each.state)
            except (KeyError, RuntimeError) as error:
                raise BadModel(
                    "does not fit this model", where=f"{folder}: layer {each.layer}", got=str(error).split("\n")[0]
                ) from error
    return model


def to_pyreft(model: PeftModel, folder: str | Path) -> None:
    """Write a model's edits as pyreft does.

    Raises:
        BadModel: the adapter is no ReFT, edits all of the prompt's tokens, or has no bias: pyreft knows none of these.
    """
    config = model.peft_config[model.active_adapter]
    if not isinstance(config, ReftConfig) or parse_positions(config.positions).all or not config.source_bias:
        raise BadModel(
            "cannot be written for pyreft",
            where=str(folder),
            got=str(config.peft_type),
            expected="ReFT with a bias, at fN, lN or last",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    edits = sorted(edits_of(model), key=lambda each: (each[1], each[0]))
    keys = [f"layer_{layer}_comp_{config.component}_unit_pos_nunit_1#{number}" for layer, number, _ in edits]
    width = next(iter(edits))[2].hidden_size
    about = {
        "intervention_constant_sources": [True] * len(edits),
        "intervention_dimensions": [width] * len(edits),
        "intervention_types": [f"<class 'pyreft.interventions.{_TYPES[config.intervention]}'>"] * len(edits),
        "mode": "parallel",
        "representations": [
            [layer, config.component, "pos", 1, config.r, *[None] * (_FIELDS - 5)] for layer, _, _ in edits
        ],
        "sorted_keys": keys,
        "transformers_version": "4.45.1",
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "args.json").write_text(
        json.dumps({"position": config.positions, "share_weights": config.share_weights}, indent=2) + "\n"
    )
    for key, (_, _, edit) in zip(keys, edits, strict=True):
        torch.save(_state(edit, config.intervention), folder / f"intkey_{key}.bin")


def _read(folder: Path) -> tuple[str, str, list[PyreftCheckpoint]]:
    """Read the kind, the component, and the interventions in the order in which they were made."""
    try:
        about = json.loads((folder / "config.json").read_text())
        keys, types = list(about["sorted_keys"]), {str(each) for each in about["intervention_types"]}
        kinds = [kind for kind, spelt in _TYPES.items() if types == {f"<class 'pyreft.interventions.{spelt}'>"}]
        found = [_KEY.fullmatch(key) for key in keys]
        order = [int(entry[0]) for entry in about["representations"]]
        files = {key: torch.load(folder / f"intkey_{key}.bin", map_location="cpu", weights_only=True) for key in keys}
    except (OSError, ValueError, KeyError, TypeError, IndexError, pickle.UnpicklingError, RuntimeError) as error:
        raise BadModel(
            "is no checkpoint of pyreft", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0]
        ) from error
    matches = [match for match in found if match]
    components = {match[2] for match in matches}
    if len(kinds) != 1 or len(components) != 1 or len(matches) != len(keys):
        raise BadModel(
            "is a checkpoint of pyreft that is not known here",
            where=str(folder / "config.json"),
            got=", ".join(sorted(types)) + f", such as {keys[:1]}",
            expected=f"one kind of {', '.join(INTERVENTIONS)}, at one component of {', '.join(COMPONENTS)}",
        )
    stored = [
        PyreftCheckpoint(int(match[1]), int(match[3]), files[key]) for match, key in zip(matches, keys, strict=True)
    ]
    stored.sort(key=lambda each: (each.number, order.index(each.layer)))
    return kinds[0], components.pop(), stored


def _args(folder: Path) -> Mapping[str, Any]:
    for path in (folder / "args.json", folder.parent / "args.json", folder.parent / "case.json"):
        if path.is_file():
            content = json.loads(path.read_text())
            return content if isinstance(content, dict) else {}
    return {}


def edits_of(model: PeftModel) -> Iterator[tuple[int, int, Any]]:
    """Yield every edit of the active adapter with its layer and its number there: 0 first or only, 1 last."""
    base = model.get_base_model()
    for number, layer in enumerate(layers_of(base).values()):
        for module in layer.modules():
            if isinstance(module, ReftLayer):
                spans: Any = module.reft_edits[str(model.active_adapter)]
                for place, edit in enumerate(spans.values()):
                    yield number, place, edit


def _source(state: Mapping[str, Any]) -> Tensor:
    found: Tensor = state["learned_source"] if "learned_source" in state else state["learned_source.weight"]
    return found


def _drawn(hidden_size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Draw a new rotation and its completion from the random state in pyreft's order, and W and b after them."""
    rotation = nn.init.orthogonal_(torch.empty(hidden_size, rank))
    completion = torch.randn(hidden_size, hidden_size - rank)
    nn.Linear(hidden_size, rank)
    return rotation, completion


def _seed_of(first: Mapping[str, Any]) -> int:
    if "rotate_layer" not in first:
        return 0
    for seed in range(100):
        torch.manual_seed(seed)
        drawn = nn.init.orthogonal_(torch.empty(first["rotate_layer"].shape))
        if torch.allclose(drawn, first["rotate_layer"].float(), rtol=0, atol=1e-4):
            return seed
    return 0


@torch.no_grad()
def _fill(edit: Edit, state: Mapping[str, Any]) -> None:
    if not isinstance(edit.directions, Rotation):
        edit.directions.weight.copy_(state["proj_layer.weight"])
        if edit.directions.bias is not None:
            edit.directions.bias.copy_(state["proj_layer.bias"])
    elif "rotate_layer" in state:
        rotation = state["rotate_layer"].float()
        _, completion = _drawn(*rotation.shape)
        edit.directions.set(rotation.mT.contiguous(), torch.cat([rotation, completion], dim=1))
    else:
        base, original = (state[f"{_PARAMETRIZED}.{name}"].float() for name in ("0.base", "original"))
        edit.directions.set(base[:, : original.shape[1]].mT.contiguous(), base)
        if torch.tril(original, -1).any():  # it was trained
            edit.directions.angles.copy_(torch.tril(original, -1))
    if isinstance(edit.source, nn.Linear):
        prefix = "" if "weight" in state else "learned_source."
        edit.source.weight.copy_(state[f"{prefix}weight"])
        edit.source.bias.copy_(state[f"{prefix}bias"])
    else:
        edit.source.copy_(state["learned_source"])


@torch.no_grad()
def _state(edit: Edit, kind: str) -> OrderedDict[str, Any]:
    """Return an edit's tensors under pyreft's names. The bias that nodireft has there unused is written as 0."""
    own: OrderedDict[str, Any] = OrderedDict()
    if isinstance(edit.source, nn.Linear):
        prefix = "" if kind == "loreft" else "learned_source."
        own |= {f"{prefix}weight": edit.source.weight.clone(), f"{prefix}bias": edit.source.bias.clone()}
    else:
        own["learned_source"] = edit.source.clone()
    if kind == "loreft":
        own["rotate_layer"] = edit.directions().mT.contiguous().clone()
        return own
    if isinstance(edit.directions, Rotation):
        own |= _parametrized(edit.directions().mT.contiguous())
    else:
        weight, bias = edit.directions.weight, edit.directions.bias
        own["proj_layer.weight"] = weight.clone()
        own["proj_layer.bias"] = torch.zeros(len(weight)) if bias is None else bias.clone()
    return own | {name: torch.tensor(edit.hidden_size) for name in ("embed_dim", "interchange_dim")}


_PARAMETRIZED = "rotate_layer.parametrizations.weight"


def _parametrized(columns: Tensor) -> dict[str, Tensor]:
    """Orthonormal columns as PyTorch's parametrization has them before a training."""
    hidden_size, rank = columns.shape
    reflectors, scales = torch.geqrf(columns)
    original, base = torch.zeros(hidden_size, rank), torch.ormqr(reflectors, scales, torch.eye(hidden_size))
    original.diagonal().fill_(-1)
    base[:, :rank] = columns
    return {f"{_PARAMETRIZED}.original": original, f"{_PARAMETRIZED}.0.base": base}
