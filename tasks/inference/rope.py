"""Rotary positions that depend on how long a sequence is: dynamic NTK scaling and LongRoPE (arXiv:2402.13753).

transformers takes the longest row of a batch for all of it, and with dynamic scaling the longest that it has seen. Here
rows of one batch are only those that would have the same frequencies alone, and what was seen before is forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn


def alike(config: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Group rows of these lengths in tokens by the frequencies that each has alone; numbers in their order.

    Args:
        config: of a model, or of its text part.
        lengths: of the rows.
    """
    ropes = list(_changing(config.get_text_config()))
    return grouped(tuple(_frequencies(kind, limit, length) for kind, limit in ropes) for length in lengths)


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the numbers of equal keys together, in the order in which they come."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def forget_longest(base: nn.Module) -> None:
    """Give dynamically scaled positions the frequencies back that they had before a long row was seen."""
    if not any(kind == "dynamic" for kind, _ in _changing(base.config.get_text_config())):  # type: ignore[union-attr, operator]
        return
    for module in base.modules():
        longest = getattr(module, "original_max_seq_len", None)
        for name in [each for each in (*vars(module), *module._buffers) if each.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            now: Any = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", getattr(module, name).to(now.device), persistent=False)
            for seen in {f"{prefix}max_seq_len_cached", "max_seq_len_cached"} & vars(module).keys():
                setattr(module, seen, longest)


def _changing(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the kind of each rope that changes, and the length in tokens after which it does."""
    given = getattr(config, "rope_parameters", None) or {}
    for each in (given, *(inner for inner in given.values() if isinstance(inner, Mapping))):
        kind = str(each.get("rope_type") or each.get("type"))
        if "dynamic" in kind:
            yield "dynamic", int(config.max_position_embeddings)
        elif kind == "longrope":
            yield kind, int(each.get("original_max_position_embeddings") or config.max_position_embeddings)


def _frequencies(kind: str, limit: int, length: int) -> int:
    """Return what tells frequencies apart: with LongRoPE only whether a row is long, else its own length."""
    return int(length > limit) if kind == "longrope" else max(length, limit)
