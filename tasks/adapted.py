"""Adapters on models: a fresh one to train, its published form on disk, and a model with a published one on it.

The published form is PEFT's: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import BadModel
from tasks.models import Model, load_model
from tasks.outputs import as_json, write_whole
from tasks.params import LoreftAdapter, QloraAdapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from tasks.adapters.reft import Reft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FOLDER = "adapter"
"""Where a model folder keeps an adapter that cannot be merged."""

Adapter = QloraAdapter | LoreftAdapter


def fresh(base: Path, adapter: Adapter) -> Model:
    """The base model with a new, trainable adapter on it."""
    if isinstance(adapter, LoreftAdapter):
        model = load_model(base)
        _attach_reft(model, adapter.model_dump())
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        task_type="CAUSAL_LM",
    )
    # not through PEFT's prepare_model_for_kbit_training: it turns norms and embeddings to float32, which the model that
    # is merged, evaluated and served does not have
    return get_peft_model(load_model(base, adapter), config)


def load_adapted(base: Path, folder: Path, adapter: Adapter) -> Model:
    """The model that was trained: the base in the form it was trained on, with a published adapter.

    Raises:
        BadModel: the adapter is damaged, unknown, does not fit this base, or would change nothing.
    """
    return attach(load_model(base, adapter if isinstance(adapter, QloraAdapter) else None), folder)


def attach(model: PreTrainedModel, folder: Path) -> Model:
    """Puts a published adapter on a model, for inference."""
    config, state = _read(folder)
    if config["peft_type"] == "REFT":
        reft = _attach_reft(model, config)
        reft.freeze()
        _fill(reft.state_dict(), state, folder)
        model.eval()
        return model
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    _fill(_lora_state(adapted), state, folder)
    return adapted.requires_grad_(False).eval()


def load_packaged(folder: Path) -> Model:
    """The model of a folder that `merge` wrote: with its adapter, when it holds one that could not be merged."""
    model = load_model(folder)
    return attach(model, folder / FOLDER) if (folder / FOLDER).is_dir() else model


def publish(model: Model, adapter: Adapter, folder: Path) -> None:
    """Writes the adapter of a trained model in its published form."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in published_state(model).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_whole(folder / CONFIG, as_json(_config(model, adapter)))


def published_state(model: Model) -> dict[str, Tensor]:
    """The tensors that an adapter is published as; of ReFT the orthogonal matrices, not what they are made from."""
    from tasks.adapters.reft import edits_on

    edits = edits_on(model)
    return edits.published_state() if edits else _lora_state(model)


def _config(model: Model, adapter: Adapter) -> dict[str, Any]:
    if isinstance(adapter, LoreftAdapter):
        return {"peft_type": "REFT", **adapter.model_dump()}
    config: dict[str, Any] = model.peft_config["default"].to_dict()  # type: ignore[union-attr]
    # PEFT holds target modules as a set, whose order differs from process to process
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()} | {
        "base_model_name_or_path": None
    }


def _lora_state(model: PeftModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def _attach_reft(model: PreTrainedModel, config: Mapping[str, Any]) -> Reft:
    from tasks.adapters.reft import Reft

    count, hidden = model.config.num_hidden_layers, model.config.hidden_size
    layers = range(count) if config["layers"] == "all" else config["layers"]
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise BadModel("has no such layer", where="adapter.layers", got=str(outside), expected=f"0 to {count - 1}")
    if config["rank"] > hidden:
        raise BadModel(
            "exceeds the hidden size", where="adapter.rank", got=str(config["rank"]), expected=f"at most {hidden}"
        )
    reft = Reft(hidden, layers, config["rank"], config["dropout"]).to(model.device)
    reft.attach(model.get_decoder())
    model.add_module("reft", reft)
    return reft


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadModel("is not a readable adapter", where=str(folder), got=str(error), fix="train it again") from error
    if config.get("peft_type") not in ("LORA", "REFT"):
        raise BadModel(
            "is of an unknown kind",
            where=str(folder / CONFIG),
            got=str(config.get("peft_type")),
            expected="LORA or REFT",
        )
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise BadModel("has values that are not finite; refused", where=str(folder), examples=broken)
    return config, state


def _fill(target: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    """Copies an adapter's tensors into a model's. PEFT itself loads an adapter that matches nothing without a word."""
    wrong = [f"{name}: the model has no such place" for name in state.keys() - target.keys()]
    wrong += [f"{name}: missing in the adapter" for name in target.keys() - state.keys()]
    wrong += [
        f"{name}: shape {tuple(state[name].shape)}, the model wants {tuple(target[name].shape)}"
        for name in state.keys() & target.keys()
        if state[name].shape != target[name].shape
    ]
    if wrong or not state:
        raise BadModel(
            f"{len(state.keys() & target.keys())} of {len(target)} adapter tensors match this base model",
            where=str(folder),
            examples=sorted(wrong),
            fix="use the base that the adapter was trained on",
        )
    for name, tensor in state.items():
        target[name].data.copy_(tensor)
