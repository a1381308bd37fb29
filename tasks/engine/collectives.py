"""Several processes that train one model: data parallelism for a step that is written as parts which add up.

Each process takes some of the parts of a step; gradients and whatever is logged are then sums over all processes, so
that all of them clip, check and update to the same bits. Random numbers that only one process needs are its own, and a
fixed function of the seed, the step and its rank. The first process alone writes and says anything. A process that was
launched by itself notices nothing of all this.

Weights that are not trained may be sharded (`tasks/train/fsdp.py`): then every process must take part in every pass.
What the launcher was configured to do is told by the environment, in the words of accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.core.errors import BadInput, BadParams, Transient
from tasks.core.ranks import ALONE, World, is_first, join_world, launched, world

if TYPE_CHECKING:
    import torch
    from torch import Tensor


T = TypeVar("T")

WAIT = timedelta(hours=6)
"""So long a process waits for another, which may be writing much: the launcher notices one that has ended at once."""

BUCKET_NUMBERS = 2**26
"""So many gradients are summed at once, at most: 256 MiB of them."""


@contextmanager
def group() -> Iterator[None]:
    """Join the processes launched together into one group within this block; all but the first are silent.

    Raises:
        BadParams: there are more processes on this machine than GPUs.
    """
    found = launched()
    if found == ALONE:
        yield
        return
    import torch
    from torch import distributed

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        if found.local_rank >= torch.cuda.device_count():
            raise BadParams(
                "there are more processes than GPUs",
                where="num_processes",
                got=f"a process numbered {found.local_rank} on a machine with {torch.cuda.device_count()}",
                fix="launch one process per GPU",
            )
        torch.cuda.set_device(found.local_rank)
    distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=WAIT)
    with ExitStack() as stack:
        if found.rank:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        join_world(found)
        try:
            yield
        finally:
            join_world(ALONE)
    distributed.destroy_process_group()  # after an error the others may wait for an answer that never comes


def share_of_rank(items: Sequence[T], size: int, to: World) -> list[tuple[Sequence[T], bool]]:
    """Split items into the parts that a process works on, each with whether it counts.

    All processes get as many parts, and in the same place parts of as many items, so that they go through a model with
    sharded weights in step. Where items are left over, a process that gets none of them works along on another's, and
    what comes of it does not count.

    Args:
        items: those of a step, at least one.
        size: how many make a part.
        to: which process.
    """
    each, left = divmod(len(items), to.size)
    own, last = items[to.rank : each * to.size : to.size], items[each * to.size :]
    parts = [(own[start : start + size], True) for start in range(0, each, size)]
    if left:
        at = min(to.rank, left - 1)
        parts.append((last[at : at + 1], to.rank < left))
    return parts


@contextmanager
def rank_rng() -> Iterator[None]:
    """Let each process draw its own random numbers within this block; after it, all draw the same again."""
    if world() == ALONE:
        yield
        return
    import torch

    seed = int(torch.randint(2**62, ())) + world().rank
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place.

    Raises:
        Transient: another process is gone.
    """
    if world() == ALONE:
        return tensor
    from torch import distributed

    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise Transient(
            "another process of this training is gone",
            where=f"process {world().rank} of {world().size}",
            got=str(error).split("\n")[0],
            fix="see what it said; if it said nothing, run it again",
        ) from error
    return tensor


def sum_over_ranks(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sum numbers over all processes, which give the same names."""
    if world() == ALONE:
        return dict(numbers)
    import torch

    sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=_device())
    all_reduce(sums)
    return dict(zip(numbers, sums.tolist(), strict=True))


def any_rank(found: bool) -> bool:
    """Return whether something is true in any process; the same answer in all."""
    return sum_over_ranks({"": found})[""] > 0


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every gradient over all processes, a missing one counting as zero; added up in float32.

    A parameter that has a gradient nowhere is left without one, as an optimizer would find it in a single process.
    """
    if world() == ALONE:
        return
    import torch

    ordered = list(parameters)
    known = torch.tensor([float(p.grad is not None) for p in ordered], device=_device())
    all_reduce(known)
    used = [parameter for parameter, times in zip(ordered, known.tolist(), strict=True) if times]
    for bucket in _buckets(used):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        all_reduce(flat)
        for parameter, gradient, total in zip(bucket, gradients, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = gradient.copy_(total.view_as(gradient))


def check_agreed(what: str, found: int, *, fix: str) -> None:
    """Refuse to go on where processes found different things.

    Raises:
        BadInput: they did.
    """
    of_first = sum_over_ranks({"": found if is_first() else 0})[""]
    if any_rank(found != of_first):
        raise BadInput(
            f"the processes do not agree on {what}",
            where=f"process {world().rank} of {world().size}",
            got=str(found),
            expected=f"{of_first:.0f}, as the first has it",
            fix=fix,
        )


def barrier() -> None:
    """Wait until all processes are here."""
    any_rank(False)


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in their order, as many at once as have BUCKET_NUMBERS; at least one."""
    bucket, numbers = list[Any](), 0
    for parameter in parameters:
        if bucket and numbers + parameter.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(parameter)
        numbers += parameter.numel()
    if bucket:
        yield bucket


def _device() -> torch.device:
    """Return this process's GPU, which is the current one, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
