"""Puts edits into a model as PEFT puts any adapter: the method's configuration, its layers, its registration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from tasks.adapters.edits import KINDS, Edit
from tasks.adapters.prompts import Prompts, Spans, parse_positions, prompts_of

COMPONENTS = {
    "block_output": ("",),
    "attention_output": ("self_attn", "attn", "attention", "self_attention", "layer.0"),
    "mlp_output": ("mlp", "feed_forward", "ffn", "fc2", "layer.1"),
}
"""What can be edited in a layer, and what the module is called whose output that is."""

CHILD = "reft"
"""Under what name an edited module holds its edits."""


@dataclass
class ReftConfig(PeftConfig):  # type: ignore[misc]
    """What is edited, where and how.

    Raises:
        ValueError: a value that there is not.
    """

    intervention: str = field(default="loreft", metadata={"help": "One of " + ", ".join(KINDS)})
    r: int = field(default=4, metadata={"help": "Dimensions of the edited subspace"})
    layers: str | list[int] = field(default="all", metadata={"help": "Numbers of layers from 0, or all"})
    component: str = field(default="block_output", metadata={"help": "One of " + ", ".join(COMPONENTS)})
    positions: str = field(default="last", metadata={"help": "Of the prompt: last, all, fN, lN or fN+lM"})
    share_weights: bool = field(default=False, metadata={"help": "One edit a layer for first and last tokens"})
    dropout: float = field(default=0.0, metadata={"help": "Share of the edit that is zeroed in training"})
    projection_bias: bool = field(default=True, metadata={"help": "Whether noreft's projection has a bias"})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Found from layers and component"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        parse_positions(self.positions)
        for name, known in (("intervention", KINDS), ("component", COMPONENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.r < 1:
            raise ValueError(f"r: got {self.r}, expected at least 1")
        if not (self.layers == "all" or (isinstance(self.layers, list) and self.layers)):
            raise ValueError(f"layers: got {self.layers!r}, expected all, or a list of numbers")


class ReftLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The edits of one module's output, by adapter and span; a child of that module, which keeps its own names."""

    active_adapters: Any
    set_adapter: Any
    adapter_layer_names = ("reft_edits",)
    other_param_names = ("reft_spans",)

    def __init__(self, module: nn.Module, prompts: Prompts) -> None:
        super().__init__()
        self.reft_edits = nn.ModuleDict()
        self.reft_spans: dict[str, Spans] = {}
        self._prompts = prompts
        self._module = [module]  # in a list, since a child cannot have its parent for a child
        self._handle = module.register_forward_hook(self._edit)

    def update_layer(self, adapter_name: str, config: ReftConfig, hidden_size: int) -> None:
        """Adds an adapter's edits."""
        spans = parse_positions(config.positions)
        names = ("shared",) if config.share_weights and len(spans.names) > 1 else spans.names
        self.reft_spans[adapter_name] = spans
        self.reft_edits[adapter_name] = nn.ModuleDict(
            {
                name: Edit(
                    config.intervention,
                    hidden_size,
                    config.r,
                    dropout=config.dropout,
                    projection_bias=config.projection_bias,
                )
                for name in names
            }
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def take_away(self) -> None:
        """Leaves the module as it was."""
        self._handle.remove()
        del self._module[0]._modules[CHILD]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        parameters = [p for p in self._module[0].parameters() if p.device.type != "meta"]
        edits: Any = self.reft_edits[adapter_name]
        if parameters and all(p.device.type != "meta" for p in edits.parameters()):
            edits.to(device or parameters[0].device)

    def _edit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output  # (batch, seq, hidden)
        for name in self.active_adapters:
            if name in self.reft_edits:
                hidden = self._edited(hidden, name)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _edited(self, hidden: Tensor, adapter_name: str) -> Tensor:
        found = self._prompts.places(self.reft_spans[adapter_name])
        edits: Any = self.reft_edits[adapter_name]
        if found and "shared" in edits:
            rows, columns = zip(*found.values(), strict=True)
            found = {"shared": (torch.cat(rows), torch.cat(columns))}
        for span, at in found.items():
            at = (at[0].to(hidden.device), at[1].to(hidden.device))
            hidden = hidden.index_put(at, edits[span](hidden[at]))
        return hidden


class ReftModel(BaseTuner):  # type: ignore[misc]
    """A model with edits, as PEFT makes it: `get_peft_model(base, ReftConfig(...))`."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict[str, Any]) -> ReftConfig:
        peft_config.target_modules = target_modules(self.model, peft_config)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ReftConfig, key: str) -> bool:
        return key in (peft_config.target_modules or [])

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target._modules.get(CHILD)
        if not isinstance(layer, ReftLayer):
            prompts = self._followed()
            if peft_config.component != "block_output":
                block = next(name for name in layers_of(self.model) if current_key.startswith(f"{name}."))
                prompts.recall_within(self.model.get_submodule(block))
            layer = ReftLayer(target, prompts)
            target.add_module(CHILD, layer)
        layer.update_layer(adapter_name, peft_config, _text_config(self.model).hidden_size)

    def _followed(self) -> Prompts:
        """What follows the model's prompts; the first edit makes it."""
        prompts = prompts_of(self.model)
        if prompts is None:
            prompts = self.model.reft_prompts = Prompts()
            body = body_of(self.model)
            prompts.follow(self.model, body)
        return prompts

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{CHILD}.reft_edits.{adapter_name}.", f".{CHILD}.reft_edits.")

    def _unload_and_optionally_merge(self, merge: bool = True, **_: Any) -> nn.Module:
        if merge:
            raise ValueError("ReFT edits prompt tokens alone, which no weights can say: use unload(), or keep it apart")
        for layer in [module for module in self.model.modules() if isinstance(module, ReftLayer)]:
            layer.take_away()
        if prompts := prompts_of(self.model):
            prompts.leave()
            del self.model.reft_prompts
        del self.model.peft_config
        model: nn.Module = self.model
        return model


def target_modules(model: nn.Module, config: ReftConfig) -> list[str]:
    """The names of the modules whose outputs are edited.

    Raises:
        ValueError: the model has no such layer or component, or fewer dimensions than the rank.
    """
    layers = layers_of(model)
    hidden_size = _text_config(model).hidden_size
    if config.r > hidden_size:
        raise ValueError(f"r: got {config.r}, expected at most the hidden size, {hidden_size}")
    names = list(layers)
    chosen = range(len(names)) if config.layers == "all" else config.layers
    if outside := [number for number in chosen if not 0 <= int(number) < len(names)]:
        raise ValueError(f"layers: got {outside}, expected 0 to {len(names) - 1}")
    found = []
    for number in chosen:
        layer, name = layers[names[int(number)]], names[int(number)]
        within = next((part for part in COMPONENTS[config.component] if not part or _has(layer, part)), None)
        if within is None:
            held = ", ".join(child for child, _ in layer.named_children())
            raise ValueError(f"component: {name} has no {config.component}; it holds {held}")
        found.append(f"{name}.{within}" if within else name)
    return found


def body_of(model: nn.Module) -> nn.Module:
    """The stack of layers that reads the prompt: the encoder where there is one, else the decoder."""
    encodes = getattr(_config(model), "is_encoder_decoder", False)
    body: nn.Module = model.get_encoder() if encodes else model.get_decoder()  # type: ignore[operator]
    return body


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of that stack by their names in the model, in order.

    Raises:
        ValueError: they cannot be told.
    """
    body, count = body_of(model), _text_config(model).num_hidden_layers
    stack = next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__}: no list of {count} layers was found in it")
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in stack}


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _config(model: nn.Module) -> Any:
    return model.config


def _text_config(model: nn.Module) -> Any:
    config = _config(model)
    return config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()


def _peft_type() -> PeftType:
    return PeftType("REFT")


def _register() -> None:
    """Makes PEFT know the method, once."""
    if "REFT" in PeftType.__members__:
        return
    extend_enum(PeftType, "REFT", "REFT")
    register_peft_method(name="reft", config_cls=ReftConfig, model_cls=ReftModel, prefix=ReftModel.prefix)


_register()
