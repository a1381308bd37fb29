"""What a method of PEFT puts into a base, as a whole that can be taken out and put in again at once.

Several methods can be in a base together where no two of them replace its layers: ReFT and bottlenecks hang on the
outputs of modules, LoRA and IA3 each replace linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from tasks.adapters.hooks import HookedLayer
from tasks.adapters.reft.prompt_positions import Prompts

Children = Mapping[tuple[nn.Module, str], nn.Module]
"""What every module of a model holds under each of its names."""

_HELD_BY_BASE = ("peft_config", "reft_prompts")
"""Attributes that a method gives the base."""


def children_of(model: nn.Module) -> Children:
    """List what every module of a model holds."""
    return {(module, name): child for module in model.modules() for name, child in module.named_children()}


class MethodLayers:
    """The layers of adapters of one method, which are in the base now.

    Args:
        tuned: the model around that base, with the adapters.
        bare: what the base's modules hold without them.
    """

    def __init__(self, tuned: PeftModel, bare: Children) -> None:
        self.tuned = tuned
        self.in_base = True
        """Whether they are in the base."""
        self._base: Any = tuned.get_base_model()
        self._held = {name: vars(self._base)[name] for name in _HELD_BY_BASE if name in vars(self._base)}
        modules = {module for module, _ in bare} | set(bare.values())
        self._changes = [
            (module, name, child, bare.get((module, name)))
            for (module, name), child in children_of(self._base).items()
            if module in modules and bare.get((module, name)) is not child
        ]

    def take_out(self) -> None:
        """Leave the base as it is without them, but for hooks that do nothing."""
        if not self.in_base:
            return
        for module, name, _, bare in self._changes:
            if bare is None:
                del module._modules[name]
            else:
                module._modules[name] = bare
        for name in self._held:
            vars(self._base).pop(name, None)  # another method's may have been in its place
        self._switch(on=False)

    def put_in(self) -> None:
        """Put them where they were."""
        if self.in_base:
            return
        for module, name, layer, _ in self._changes:
            module._modules[name] = layer
        vars(self._base).update(self._held)
        self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        self.in_base = on
        for _, _, layer, _ in self._changes:
            if isinstance(layer, HookedLayer):
                layer.rests = not on
        for held in self._held.values():
            if isinstance(held, Prompts):
                held.rests = not on
