"""Methods of PEFT that change what a module gives, by hooks: the base model keeps its modules and their names.

What such a method needs of PEFT's own machinery, and where the layers and sublayers of a model are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from aenum import extend_enum
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from tasks.adapters.pass_state import PassState
from tasks.adapters.positions import parse_layers
from tasks.models.decoder import decoder_of

COMPONENTS = {
    "block_output": ("",),
    "attention_output": ("self_attn", "attn", "attention", "self_attention", "layer.0"),
    "mlp_output": ("mlp", "feed_forward", "ffn", "fc2", "layer.1"),
}
"""What can be changed in a layer, and what the module is called whose output that is."""

Members: TypeAlias = Mapping[str, Tensor]
"""Where the tokens of each adapter are in a pass over one sequence, (tokens,) int64."""


class _MixedPass(PassState):
    members: Members | None = None


mixed_pass = _MixedPass()
"""Whose the tokens of this thread's pass are, where it is of several adapters (`tasks.adapters.mixed_batch`)."""


class HookedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Changes one module's output; a child of that module, with parts of its own for each adapter."""

    active_adapters: Any
    set_adapter: Any
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rests = False
        """Whether it is out of the model for now, but for its hooks."""
        self._module = [module]  # in a list, since a child cannot have its parent for a child
        self._handles = [module.register_forward_hook(self._change)]

    @property
    def parts(self) -> nn.ModuleDict:
        """Return the part of each adapter here, by the adapter's name."""
        parts: nn.ModuleDict = getattr(self, self.adapter_layer_names[0])
        return parts

    def add(self, adapter_name: str, part: nn.Module, *, inference_mode: bool) -> None:
        """Give an adapter its part."""
        self.parts[adapter_name] = part
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def take_away(self, name: str) -> None:
        """Restore the module as it was; `name` is the attribute under which it holds this layer."""
        for handle in self._handles:
            handle.remove()
        del self._module[0]._modules[name]

    @abstractmethod
    def changed(self, hidden: Tensor, adapter_name: str) -> Tensor:
        """Apply an adapter to hidden states of shape (batch, tokens, hidden)."""

    @abstractmethod
    def changed_at(self, hidden: Tensor, adapter_name: str, at: Tensor) -> Tensor:
        """Apply an adapter to the tokens `at` (tokens,) of hidden states of shape (1, tokens, hidden)."""

    def _change(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.disable_adapters or self.rests:
            return output
        several = isinstance(output, (tuple, list))
        hidden = output[0] if several else output
        if mixed_pass.members is None:
            for name in self.active_adapters:
                if name in self.parts:
                    hidden = self.changed(hidden, name)
        else:
            for name, at in mixed_pass.members.items():
                if name in self.parts:
                    hidden = self.changed_at(hidden, name, at)
        if not several:
            return hidden
        return type(output)(hidden, *output[1:]) if hasattr(output, "_fields") else type(output)((hidden, *output[1:]))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        known = [p for p in self._module[0].parameters() if p.device.type != "meta"]
        part = self.parts[adapter_name]
        if known and all(p.device.type != "meta" for p in part.parameters()):
            part.to(device or known[0].device)


class HookedTuner(BaseTuner):  # type: ignore[misc]
    """A model with such layers, as PEFT makes it: `get_peft_model(base, config)`."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    child: ClassVar[str]
    """Under what name a changed module holds the layer."""
    unmergeable: ClassVar[str]
    """Why the adapter cannot become part of the weights."""

    @abstractmethod
    def targets(self, config: Any) -> list[str]:
        """Return the names of the modules whose outputs are changed."""

    @abstractmethod
    def new_layer(self, module: nn.Module, name: str, config: Any) -> HookedLayer:
        """Build a layer without parts on a module of that name."""

    @abstractmethod
    def new_part(self, layer: Any, adapter_name: str, config: Any) -> nn.Module:
        """Build an adapter's part for a layer."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config.target_modules = self.targets(peft_config)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in (peft_config.target_modules or [])

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target._modules.get(self.child)
        if not isinstance(layer, HookedLayer):
            layer = self.new_layer(target, current_key, peft_config)
            target.add_module(self.child, layer)
        part = self.new_part(layer, adapter_name, peft_config)
        layer.add(adapter_name, part, inference_mode=peft_config.inference_mode)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        held = f".{cls.child}.{cls.tuner_layer_cls.adapter_layer_names[0]}."
        return key.replace(f"{held}{adapter_name}.", held)

    def _unload_and_optionally_merge(self, merge: bool = True, **_: Any) -> nn.Module:
        if merge:
            raise ValueError(f"{self.unmergeable}: use unload(), or keep the adapter apart")
        for layer in [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]:
            layer.take_away(self.child)
        del self.model.peft_config
        model: nn.Module = self.model
        return model


def register_with_peft(name: str, config: type[Any], model: type[HookedTuner]) -> None:
    """Register a method with PEFT."""
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)


def peft_type(name: str) -> PeftType:
    """Add the name of a method to PEFT's enumeration, which has no place for new ones."""
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType(name)


# --- where layers are -------------------------------------------------------------------------------------------------


def body_of(model: nn.Module) -> nn.Module:
    """Return the stack of layers that reads the prompt: the encoder where there is one, else the decoder."""
    encodes = getattr(decoder_config(model), "is_encoder_decoder", False)
    if encodes:
        encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder
    return decoder_of(model) or model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of that stack by their names in the model, in order.

    Raises:
        ValueError: they cannot be identified.
    """
    body, count = body_of(model), getattr(decoder_config(model), "num_hidden_layers", None)
    own = (type(decoder_config(model)), type(getattr(body, "config", None)))
    elsewhere = {  # what sees images has layers of its own
        part
        for module in body.modules()
        if hasattr(module, "config") and not isinstance(module.config, own)
        for part in module.modules()
    }
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) and m not in elsewhere]
    stack = next((m for m in lists if len(m) == count), None)
    if stack is None:  # some count otherwise, or have a part for each layer besides: what holds most is the layers
        stack = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    if stack is None:
        raise ValueError(f"{type(model).__name__}: no list of layers was found in it")
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in stack}


def chosen_layers(model: nn.Module, numbers: str | list[int]) -> dict[str, nn.Module]:
    """Select layers by their numbers, `all`, or a range such as `4-7`.

    Raises:
        ValueError: there is no such layer.
    """
    layers = layers_of(model)
    names = list(layers)
    return {names[number]: layers[names[number]] for number in parse_layers(numbers, len(names))}


def component_of(layer: nn.Module, name: str, component: str) -> str:
    """Return the name of the module in a layer whose output a component is.

    Raises:
        ValueError: the layer has no such module.
    """
    within = next((part for part in COMPONENTS[component] if not part or has(layer, part)), None)
    if within is None:
        held = ", ".join(child for child, _ in layer.named_children())
        raise ValueError(f"component: {name} has no {component}; it holds {held}")
    return f"{name}.{within}" if within else name


def has(module: nn.Module, path: str) -> bool:
    """Return whether there is a module at a path below another."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def decoder_config(model: nn.Module) -> Any:
    """Return the configuration that says how many layers there are and how wide they are."""
    config: Any = model.config
    return config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()


def hidden_size_of(model: nn.Module) -> int:
    """Return how wide a model's hidden states are.

    Raises:
        ValueError: its configuration does not say, or says several widths.
    """
    width = getattr(decoder_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(model).__name__}: its configuration says no one hidden size, got {width}")
    return width
