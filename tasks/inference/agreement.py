"""Proofs on a few tokens that two ways through a model give the same, made once before the faster one is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tasks.adapters.reft.prompt_positions import untouched
from tasks.core.errors import BadModel
from tasks.core.memory import ran_out
from tasks.models.device import autocast_dtype, has_numbers, host_read

_EXACT, _ROUNDED = 1e-3, 0.05
"""What two orders of computing may differ by, of what they give: of every token in float32, and in the median of tokens
where numbers have 16 bits or fewer, since a mixture of experts may choose others for a token by rounding alone."""


def agree(base: nn.Module, one: Tensor, other: Tensor) -> bool:
    """Return whether two results of a model for the same tokens, (tokens, width), are the same but for rounding."""
    if one.shape != other.shape:
        return False
    one, other = one.nan_to_num(), other.nan_to_num()  # broken weights are told of where they are trained
    away = (one - other).float().norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-6)
    if autocast_dtype(other.device) or any(p.dtype.itemsize < 4 for p in (other, *base.parameters())):
        return bool(away.median() <= _ROUNDED)
    return bool(away.max() <= _EXACT)


def holds(base: nn.Module, claim: str, compare: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> bool:
    """Return whether a claim about a model is true, which is found out once, whichever thread asks first.

    What is only an outline of a model, without numbers, is taken at its word.

    Args:
        base: the model, without what PEFT put around it.
        claim: its name.
        compare: gives pairs of results, (tokens, width) each, that are the same if it is true. It runs without
            gradients, dropout or edits of prompts, and an error in it is a no, but for a `BadModel`.
    """
    claims = _known.setdefault(base, {})
    if claim not in claims:
        with turn_of(base):
            if claim not in claims:
                claims[claim] = is_true(base, compare)
    return claims[claim]


def known(base: nn.Module, claim: str) -> bool | None:
    """Return what was found out about a claim; None: nothing yet."""
    return _known.get(base, {}).get(claim)


_known: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def turn_of(base: nn.Module) -> Any:
    """Return the lock of a model, which a thread may take again: for proofs, and for passes that must be alone."""
    return _turns.setdefault(base, RLock())


_turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def is_true(base: nn.Module, compare: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> bool:
    """Find out whether all pairs of results are the same, as `holds` does it."""
    if not all(has_numbers(p) for p in base.parameters()):
        return True
    with untouched(base), host_read("a proof, once for a model"):
        try:
            return all(agree(base, one, other) for one, other in compare())
        except Exception as error:  # whatever a model's own code makes of what it does not expect
            if ran_out(error) or isinstance(error, BadModel):
                raise
            return False
