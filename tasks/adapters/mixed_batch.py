"""Tokens of several adapters in one pass over their base, each with its own: a mixed batch, as PEFT calls it.

PEFT mixes the rows of a batch by `adapter_names`, for plain LoRA (`LoraLayer._mixed_batch_forward`). Where rows stand
one after another in one sequence it is tokens that differ; and IA3, ReFT and bottlenecks are mixed here as well. The
base computes all tokens at once, each adapter its own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tasks.adapters.hooks import HookedLayer, Members, mixed_pass

_Forward = Callable[..., Tensor]


def prepare(model: nn.Module, name: str) -> bool:
    """Let the layers of an adapter on a model follow `mixed`; returns whether they can, all of them."""
    tuned = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    layers = [each for each in tuned if not isinstance(each, HookedLayer)]  # whose hooks follow it by themselves
    ways = [(layer, way) for layer in layers if (way := _way(layer, name))]
    if len(ways) < len(layers):
        return False
    for layer, way in ways:
        if "forward" not in vars(layer):
            layer.forward = partial(_followed, way, layer, layer.forward)
    return True


@contextmanager
def mixed(members: Members) -> Iterator[None]:
    """Let each adapter change its own tokens alone in this thread's passes within this block.

    Args:
        members: for each adapter the places of its tokens in the sequence of a pass, (tokens,) int64, on the model's
            device. Tokens of none are the base's own.
    """
    mixed_pass.members = members
    try:
        yield
    finally:
        mixed_pass.members = None


def _way(layer: Any, name: str) -> _Forward | None:
    """Return how a layer computes a mixed batch of an adapter; None where it does not."""
    if layer.merged:
        return None
    if isinstance(layer, lora.Linear | lora.Linear8bitLt | lora.Linear4bit):
        return None if name in layer.lora_variant else _lora
    return _ia3 if isinstance(layer, ia3.Linear | ia3.Linear8bitLt | ia3.Linear4bit) else None


def _followed(way: _Forward, layer: Any, own: _Forward, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer for x (1, tokens, width), mixed where the pass is."""
    members: Mapping[str, Tensor] | None = mixed_pass.members
    return own(x, *args, **kwargs) if members is None else way(layer, members, x)


def _lora(layer: Any, members: Members, x: Tensor) -> Tensor:
    """Add to each adapter's tokens its update, in PEFT's arithmetic for one adapter."""
    result: Tensor = layer.base_layer(x)
    for name, at in members.items():
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            update = b(a(x.index_select(-2, at).to(a.weight.dtype))) * layer.scaling[name]
            if not isinstance(layer, lora.Linear):
                update = update.to(result.dtype)
            result = result.index_copy(-2, at, (result.index_select(-2, at) + update).to(result.dtype))
    return result


def _ia3(layer: Any, members: Members, x: Tensor) -> Tensor:
    """Scale what each adapter's tokens give, or what the layer makes of them."""
    scale = partial(_scaled, layer, members)
    result: Tensor = layer.base_layer(scale(x)) if layer.is_feedforward else scale(layer.base_layer(x))
    return result


def _scaled(layer: Any, members: Members, x: Tensor) -> Tensor:
    for name, at in members.items():
        if name in layer.ia3_l:
            by = layer.ia3_l[name].flatten()
            x = x.index_copy(-2, at, (x.index_select(-2, at) * by).to(x.dtype))
    return x
