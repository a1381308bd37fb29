"""Adapters on models: a fresh one to train, its published form on disk, and a model with a published one on it.

The published form is PEFT's: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.adapter_params import AnyAdapter, BottleneckAdapter, LoraAdapter, PeftAdapter, QloraAdapter, ReftAdapter
from tasks.errors import BadModel
from tasks.models import Model, load_model
from tasks.outputs import as_json, write_whole

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FOLDER = "adapter"
"""Where a model folder keeps an adapter that cannot be merged."""


def mergeable(adapter: AnyAdapter) -> bool:
    """Whether an adapter can be added to the weights; others are kept beside them."""
    return isinstance(adapter, LoraAdapter | QloraAdapter)


def fresh(base: Path, adapter: AnyAdapter) -> PeftModel:
    """The base model with a new, trainable adapter on it.

    Raises:
        BadModel: the adapter does not fit the model.
    """
    return trainable(_base_for(base, adapter), adapter)


def trainable(model: PreTrainedModel, adapter: AnyAdapter) -> PeftModel:
    """A model with a new, trainable adapter on it.

    Raises:
        BadModel: the adapter does not fit the model.
    """
    # not through PEFT's prepare_model_for_kbit_training: it turns norms and embeddings to float32, which the model that
    # is merged, evaluated and served does not have
    return _adapted(model, config_of(adapter), "params")


def load_adapted(base: Path, folder: Path, adapter: AnyAdapter) -> PeftModel:
    """The model that was trained: the base in the form it was trained on, with a published adapter.

    Raises:
        BadModel: the adapter is damaged, unknown, does not fit this base, or would change nothing.
    """
    return attach(_base_for(base, adapter), folder)


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a published adapter on a model, for inference.

    Raises:
        BadModel: the adapter is damaged, unknown, does not fit this model, or would change nothing.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config, state = _read(folder)
    adapted = _adapted(model, config, str(folder)).requires_grad_(False).eval()
    _check_places(get_peft_model_state_dict(adapted), state, folder)
    set_peft_model_state_dict(adapted, state)
    return adapted


def load_packaged(folder: Path) -> Model:
    """The model of a folder that `merge` wrote: with its adapter, when it holds one that could not be merged."""
    model = load_model(folder)
    return attach(model, folder / FOLDER) if (folder / FOLDER).is_dir() else model


def publish(model: PeftModel, folder: Path) -> None:
    """Writes the adapter of a trained model in its published form."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in published_state(model).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    # PEFT holds target modules as a set, whose order differs from process to process
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_whole(folder / CONFIG, as_json(ordered | {"base_model_name_or_path": None}))


def published_state(model: PeftModel) -> dict[str, Tensor]:
    """The tensors that an adapter is published as; of ReFT the orthogonal matrices, not what they are made from."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return state


def config_of(adapter: AnyAdapter) -> PeftConfig:
    """What PEFT makes the adapter from.

    Raises:
        BadModel: a method that PEFT does not have, or a field that the method does not have.
    """
    from peft import LoraConfig

    if isinstance(adapter, PeftAdapter):
        return _config_of_any(adapter)
    if isinstance(adapter, ReftAdapter):
        from tasks.adapters.tuner import ReftConfig

        return ReftConfig(
            intervention=adapter.name,
            r=adapter.rank,
            layers=adapter.layers,
            component=adapter.component,
            positions=adapter.positions,
            share_weights=adapter.share_weights,
            dropout=adapter.dropout,
            task_type="CAUSAL_LM",
        )
    if isinstance(adapter, BottleneckAdapter):
        from tasks.adapters.bottleneck import BottleneckConfig

        return BottleneckConfig(**adapter.model_dump(exclude={"name"}), task_type="CAUSAL_LM")
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        use_rslora=adapter.name == "rslora",
        use_dora=adapter.name == "dora",
        task_type="CAUSAL_LM",
    )


def _config_of_any(adapter: PeftAdapter) -> PeftConfig:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    known = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    chosen = known.get(adapter.method.upper())
    if chosen is None:
        names = ", ".join(sorted(known))
        raise BadModel("PEFT has no such method", where="adapter.method", got=adapter.method, expected=names)
    try:
        config: PeftConfig = chosen(**adapter.config, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise BadModel("is no configuration of this method", where="adapter.config", got=str(error)) from error
    if config.is_prompt_learning or config.peft_type in (PeftType.XLORA, PeftType.POLY):
        raise BadModel("is a method that temper cannot train", where="adapter.method", got=adapter.method)
    return config


def _base_for(base: Path, adapter: AnyAdapter) -> PreTrainedModel:
    return load_model(base, adapter if isinstance(adapter, QloraAdapter) else None)


def _adapted(model: PreTrainedModel, config: PeftConfig, where: str) -> PeftModel:
    from peft import get_peft_model

    try:
        adapted: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # NoMatchingPeftModuleError too
        raise BadModel("the adapter does not fit this model", where=where, got=str(error)) from error
    return adapted


def _read(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    import tasks.adapters.bottleneck
    import tasks.adapters.tuner  # noqa: F401  # both make their methods known to PEFT

    try:
        kind = str(json.loads((folder / CONFIG).read_text()).get("peft_type"))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise BadModel("is not a readable adapter", where=str(folder), got=str(error), fix="train it again") from error
    if kind not in {name.value for name in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise BadModel("is of an unknown kind", where=str(folder / CONFIG), got=kind, expected="a method of PEFT")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise BadModel("is not a readable adapter", where=str(folder / CONFIG), got=str(error)) from error
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise BadModel("has values that are not finite; refused", where=str(folder), examples=broken)
    return config, state


def _check_places(target: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses tensors that have no place, or a place without one: PEFT itself loads such an adapter without a word."""
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
