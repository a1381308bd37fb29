"""Several adapters of one base made into one update of its weights.

An adapter's update of a weight is the difference that it makes, in float32. How updates become one is PEFT's doing
(peft.utils.merge_utils): task arithmetic (arXiv:2212.04089), TIES (arXiv:2306.01708), DARE (arXiv:2311.03099).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from tasks.core.errors import BadModel, BadParams
from tasks.deltas.lazy_tensors import Change, ComputedTensor
from tasks.deltas.weight_deltas import changes_of
from tasks.models.safetensors_reader import StoredTensor, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

CombinationMethod: TypeAlias = Literal["linear", "svd", "ties", "dare_linear", "dare_ties"]
COMBINATIONS: tuple[str, ...] = get_args(CombinationMethod)


class Combination(NamedTuple):
    """Combination of several updates into one.

    Attributes:
        method: `linear` adds them up; `svd` keeps the best approximation of that sum of a rank; `ties` keeps each
            update's largest numbers, and of those at odds the sign that has more weight; `dare_*` drops numbers at
            random and scales up the rest, then adds up or resolves signs.
        weights: of each update.
        density: the share of numbers that ties and dare keep.
        rank: of the update that svd leaves.
        seed: of what dare drops.
    """

    method: str
    weights: tuple[float, ...]
    density: float
    rank: int
    seed: int

    def check(self, adapters: int) -> None:
        """Refuse combinations that mean nothing for this number of adapters.

        Raises:
            BadParams: the combination is one.
        """
        if len(self.weights) != adapters:
            raise BadParams(
                "there must be a weight for each adapter", got=f"{len(self.weights)} weights for {adapters} adapters"
            )
        if self.method not in COMBINATIONS:
            raise BadParams("is no way to combine adapters", got=self.method, expected=", ".join(COMBINATIONS))
        if not 0 < self.density <= 1:
            raise BadParams("density is no share", got=str(self.density), expected="above 0, at most 1")
        if self.rank < 1:
            raise BadParams("rank must be at least 1", got=str(self.rank))


def combined(
    adapters: Sequence[Path], how: Combination, base: Mapping[str, StoredTensor], family: str
) -> dict[str, Change]:
    """Combine the changes that several adapters make to the weights of a base.

    Raises:
        BadModel: one does not fit, or gives a weight another shape.
    """
    each = [changes_of(adapter, base, family) for adapter in adapters]
    names = dict.fromkeys(name for changes in each for name in changes)
    return {name: _change(name, [changes.get(name) for changes in each], how) for name in names}


def _change(name: str, changes: Sequence[Change | None], how: Combination) -> Change:
    def change(base: TensorSource) -> TensorSource:
        changed = [(apply(base), weight) for apply, weight in zip(changes, how.weights, strict=True) if apply]
        if any(source.shape != base.shape for source, _ in changed):
            raise BadModel("adapters that change a vocabulary cannot be combined", where=name)
        return ComputedTensor(lambda: _sum(name, base, changed, how), base.shape)

    return change


def _sum(name: str, base: TensorSource, changed: Sequence[tuple[TensorSource, float]], how: Combination) -> Tensor:
    import torch

    rows = math.prod(base.shape[:-1])
    before = torch.from_numpy(base.floats(0, rows))
    updates = [torch.from_numpy(source.floats(0, rows)) - before for source, _ in changed]
    weights = torch.tensor([weight for _, weight in changed])
    seed = int.from_bytes(hashlib.sha256(f"{how.seed}:{name}".encode()).digest()[:4], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (before + combine(updates, weights, how)).reshape(base.shape)


def combine(updates: Sequence[Tensor], weights: Tensor, how: Combination) -> Tensor:
    """Combine several updates into one, (rows, columns) float32; DARE draws from torch's global generator."""
    import torch
    from peft.utils import merge_utils

    tensors = list(updates)
    merged: Tensor
    if how.method == "ties":
        merged = merge_utils.ties(tensors, weights, how.density)
    elif how.method == "dare_linear":
        merged = merge_utils.dare_linear(tensors, weights, how.density)
    elif how.method == "dare_ties":
        merged = merge_utils.dare_ties(tensors, weights, how.density)
    else:
        merged = merge_utils.task_arithmetic(tensors, weights)
    if how.method == "svd":
        left, singular, right = torch.linalg.svd(merged, full_matrices=False)
        merged = left[:, : how.rank] * singular[: how.rank] @ right[: how.rank]
    return merged
