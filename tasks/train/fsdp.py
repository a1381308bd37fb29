"""Sharding of weights that are not trained, by PyTorch's FSDP2: each process holds its share of every layer.

A layer's weights are gathered when it is computed, forward and backward, and let go of after it. What is trained is
small and stays whole in every process, so that optimizers, clipping, checkpoints and the published adapter are what
they are without sharding; so do the embedding and the vocabulary head, which are read beside their modules' own
forward passes. Weights in 4 bits are sharded as the bytes that they are (FSDP-QLoRA); their scales stay whole.

A base is loaded on the host and moves to the GPUs layer by layer, so that none ever holds all of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tasks.adapters.params import AnyAdapter, FullAdapter, Int8Adapter
from tasks.core.errors import BadModel, BadParams
from tasks.core.ranks import ALONE, shards_weights, uses_fsdp, world
from tasks.inference.logprobs import find_out
from tasks.models.decoder import decoder_of, unwrapped
from tasks.models.device import device
from tasks.models.loader import Model

if TYPE_CHECKING:
    from torch import nn

_UNHEARD = {
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
}
"""What a launcher's configuration may ask for that no training here does, by what stands for leaving it."""


def check_can_shard(adapter: AnyAdapter) -> None:
    """Refuse launcher configurations that this training does not support.

    Raises:
        BadParams: weights that are trained, or held in 8 bits, cannot be sharded; or it needs something else.
    """
    if world() == ALONE:
        return
    asked = {name: os.environ.get(name, usual) for name, usual in _UNHEARD.items()}
    if uses_fsdp():
        asked["FSDP_VERSION"] = os.environ.get("FSDP_VERSION", "1")
    odd = [
        f"{name}={value}" for name, value in asked.items() if value.lower() != (_UNHEARD | {"FSDP_VERSION": "2"})[name]
    ]
    if odd:
        raise BadParams(
            "the launcher's configuration asks for what temper does not do",
            where="the configuration of accelerate",
            got=", ".join(odd),
            expected="what infra/launch/ has",
            fix="leave it out",
        )
    if shards_weights() and isinstance(adapter, FullAdapter | Int8Adapter):
        why = "they are trained" if isinstance(adapter, FullAdapter) else "bitsandbytes moves its 8 bits about"
        raise BadParams(
            f"the weights of this method cannot be sharded, since {why}",
            where="train.*.adapter",
            got=adapter.name,
            expected="an adapter on a base in 4, 16 or 32 bits",
            fix="launch it without sharding (infra/launch/ddp.yaml)",
        )


def shard_weights(model: Model) -> None:
    """Shard the frozen weights of all layers over the processes; `model` has its adapter on it.

    Raises:
        BadModel: it is not known what its layers are.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    find_out(model)  # while a process can run it by itself
    _keep_scales(model)
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
    for layer in sharded_layers(model):
        fully_shard(layer, ignored_params=_kept_whole(layer), reshard_after_forward=again)
    if not model.config.is_encoder_decoder:  # as one stack, a layer is gathered while the one before is computed
        stack = decoder_of(model) or unwrapped(model)
        fully_shard(stack, ignored_params=set(stack.parameters()), reshard_after_forward=again)
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device())


def sharded_layers(model: Model) -> list[nn.Module]:
    """Return the layers of a model's base, which transformers knows as what is never split."""
    base: Any = unwrapped(model)
    names = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        raise BadModel(
            "has no layers that are known as such, by which its weights could be sharded",
            where=type(base).__name__,
            fix="launch it without sharding (infra/launch/ddp.yaml)",
        )
    return found


def _kept_whole(layer: nn.Module) -> set[nn.Parameter]:
    """Return what is trained in a layer, and whatever else belongs to an adapter, which may read it at any time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    of_adapters = {p for module in adapters for n, p in module.named_parameters() if not n.startswith("base_layer.")}
    return of_adapters | {parameter for parameter in layer.parameters() if parameter.requires_grad}


def _keep_scales(model: Model) -> None:
    """Give 4-bit modules the scales of their weights, which the weights lose once they are sharded."""
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state
            module.quant_state.to(device())
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)
