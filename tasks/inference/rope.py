"""Rotary positions that depend on how long a sequence is: dynamic NTK scaling and LongRoPE (arXiv:2402.13753).

transformers takes the longest row of a batch for all of it, and with dynamic scaling the longest that it has seen. Here
rows of one batch are only those that would have the same frequencies alone, and every pass has its own, whatever was
seen before it or is seen beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from torch import nn

from tasks.models.decoder import forwards_instead


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


@contextmanager
def own_frequencies(base: nn.Module) -> Iterator[None]:
    """Run a pass with frequencies of its own, which begin as they were before any row was seen.

    The model's code keeps them on its modules as they change; here that is a copy, for this block and thread.
    """
    if not any(_changing(base.config.get_text_config())):  # type: ignore[union-attr, operator]
        yield
        return
    ropes = {module: _unused(module) for module in base.modules() if _original(module)}
    with forwards_instead({module: partial(type(copied).forward, copied) for module, copied in ropes.items()}):
        yield


def _unused(rope: nn.Module) -> nn.Module:
    """Copy a module of rotary positions, with the frequencies that it had before a row was seen."""
    copied, longest = copy(rope), getattr(rope, "original_max_seq_len", None)
    copied._buffers = dict(rope._buffers)
    for name in _original(rope):
        prefix = name.removesuffix("original_inv_freq")
        now: Any = getattr(rope, f"{prefix}inv_freq")
        copied._buffers[f"{prefix}inv_freq"] = getattr(rope, name).to(now.device, copy=True)
        for seen in {f"{prefix}max_seq_len_cached", "max_seq_len_cached"} & vars(rope).keys():
            setattr(copied, seen, longest)
    return copied


def _original(module: nn.Module) -> list[str]:
    """Return the names under which a module keeps the frequencies that it began with."""
    return [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]


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
