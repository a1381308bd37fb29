"""Sharding of weights that are not trained, by PyTorch's FSDP2: each process holds its share of every layer.

A layer's weights are gathered when it is computed, forward and backward, and let go of after it. What is trained is
small and stays whole in every process, so that optimizers, clipping, checkpoints and the published adapter are what
they are without sharding; so do the embedding and the vocabulary head, which are read beside their modules' own
forward passes. Weights in 4 bits are sharded as the bytes that they are (FSDP-QLoRA); their scales stay whole.

The launcher's configuration says whether weights are sharded: `accelerate launch` tells by the environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tasks.adapter_params import AnyAdapter, FullAdapter, Int8Adapter
from tasks.distributed import ALONE, world
from tasks.errors import BadParams
from tasks.logits import base_of
from tasks.models import Model

if TYPE_CHECKING:
    from torch import nn


def is_asked() -> bool:
    """Whether the processes that were launched together are to shard weights."""
    return world() != ALONE and (_is_fsdp() or _zero_stage() == ZERO_OF_WEIGHTS)


ZERO_OF_WEIGHTS = 3
"""The stage of ZeRO that shards weights, beside gradients and optimizer states (arXiv:1910.02054, section 5)."""


def check(adapter: AnyAdapter) -> None:
    """Refuses what cannot be sharded.

    Raises:
        BadParams: the adapter trains the base's own weights, or holds them in 8 bits; or FSDP is of another version.
    """
    if not is_asked():
        return
    if _is_fsdp() and (version := os.environ.get("FSDP_VERSION")) != "2":
        raise BadParams("weights are sharded by FSDP2", where="fsdp_version", got=str(version), expected="2")
    if isinstance(adapter, FullAdapter | Int8Adapter):
        why = "are trained" if isinstance(adapter, FullAdapter) else "are in 8 bits, which bitsandbytes moves about"
        raise BadParams(
            f"the weights of this method cannot be sharded, since they {why}",
            where="train.*.adapter",
            got=adapter.name,
            expected="an adapter on a base in 4, 16 or 32 bits",
            fix="launch it without sharding (infra/launch/ddp.yaml)",
        )


def shard(model: Model) -> None:
    """Leaves each process its share of the frozen weights of all layers; `model` has its adapter on it."""
    from torch.distributed.fsdp import fully_shard

    keep_scales(model)
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
    for layer in layers_of(model):
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, ignored_params=trained, reshard_after_forward=again)


def layers_of(model: Model) -> list[nn.Module]:
    """The layers of a model's base, which transformers knows as what is never split."""
    base: Any = base_of(model)
    names = set(base._no_split_modules or ())
    return [module for module in base.modules() if type(module).__name__ in names]


def keep_scales(model: Model) -> None:
    """Gives 4-bit modules the scales of their weights, which are lost to the weights once these are sharded."""
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)


def _is_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _zero_stage() -> int:
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0)) if asked else 0
