"""Low-rank updates of parts of a fused projection: of q and v where one matrix holds q, k and v.

As loralib's MergedLinear does it (arXiv:2106.09685): every part has an A and a B of its own, and the other rows of the
matrix stay untouched. Here both A's lie in one matrix A of (parts x rank, in) and the B's on the diagonal of one B of
(out, parts x rank) whose other blocks are and stay zero. So what is saved is an ordinary LoRA adapter, which any
library loads and merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tasks.core.errors import BadModel

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_ONE_AFTER_ANOTHER = {
    ("gpt2", "c_attn"),
    ("baichuan", "W_pack"),
    ("mpt", "Wqkv"),
    ("phi3", "qkv_proj"),
}
"""Rows of q, then of k, then of v."""

_HEAD_BY_HEAD = {("gpt_neox", "query_key_value"), ("bloom", "query_key_value")}
"""For each head its rows of q, of k and of v."""

_GATE_UP = {("phi3", "gate_up_proj"), ("glm", "gate_up_proj"), ("glm4", "gate_up_proj")}
"""The upper half is the gate, the lower what it gates."""


def rows_of_parts(module: str, rows: int, config: Any) -> dict[str, Tensor]:
    """Find which rows of a fused projection's output belong to which part, each (rows,), int64.

    Args:
        module: the last component of its name.
        rows: how many it has in all.
        config: the model's configuration.

    Raises:
        BadModel: how this architecture lays them out is not known.
    """
    place = torch.arange(rows)
    if (config.model_type, module) in _GATE_UP:
        return dict(zip(("gate", "up"), place.chunk(2), strict=True))
    if (config.model_type, module) == ("falcon", "query_key_value"):
        return _of_falcon(place, config)
    heads = config.num_attention_heads
    if (config.model_type, module) in _HEAD_BY_HEAD:
        return dict(zip("qkv", (part.flatten() for part in place.view(heads, 3, -1).unbind(1)), strict=True))
    if (config.model_type, module) in _ONE_AFTER_ANOTHER:
        groups = config.num_key_value_heads if config.model_type == "phi3" else heads
        width = rows // (heads + 2 * groups)
        return dict(zip("qkv", place.split([heads * width, groups * width, groups * width]), strict=True))
    known = sorted({f"{kind}: {name}" for kind, name in _ONE_AFTER_ANOTHER | _HEAD_BY_HEAD | _GATE_UP})
    raise BadModel(
        "is no fused projection whose parts are known",
        where=f"adapter.targets.{module}",
        got=f"{module} of {config.model_type}",
        expected=", ".join([*known, "falcon: query_key_value"]),
        fix="update the whole projection: all",
    )


def _of_falcon(place: Tensor, config: Any) -> dict[str, Tensor]:
    heads = config.num_attention_heads
    if config.new_decoder_architecture:  # for each group its queries, a key and a value
        groups = config.num_kv_heads
        grouped = place.view(groups, heads // groups + 2, -1)
        q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    elif config.multi_query:  # all queries, one key, one value
        by_head = place.view(heads + 2, -1)
        q, k, v = by_head[:-2], by_head[-2], by_head[-1]
    else:
        q, k, v = place.view(heads, 3, -1).unbind(1)
    return {"q": q.flatten(), "k": k.flatten(), "v": v.flatten()}


def keep_parts_apart(model: PeftModel, targets: Mapping[str, str | Sequence[str]]) -> None:
    """Let the LoRA updates of fused projections reach only the rows of the chosen parts.

    Args:
        model: with a fresh LoRA adapter, whose B's are zero.
        targets: module names, each with its parts or `all`.

    Raises:
        BadModel: a projection does not have such parts.
    """
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        parts = targets.get(leaf, "all")
        if parts == "all" or "lora_B" not in module._modules:
            continue
        b = module.lora_B["default"].weight  # (out, parts x rank)
        known = rows_of_parts(leaf, b.shape[0], model.config)
        if unknown := sorted(set(parts) - known.keys()):
            raise BadModel(
                "has no such parts", where=f"adapter.targets.{leaf}", got=", ".join(unknown), expected=", ".join(known)
            )
        rank = b.shape[1] // len(parts)
        own = torch.zeros_like(b)
        for number, part in enumerate(parts):
            own[known[part].to(b.device), number * rank : (number + 1) * rank] = 1.0
        b.register_hook(own.mul)
