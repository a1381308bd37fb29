"""Passes of several threads through one model: beside each other, or in turn where one would disturb another.

Most models keep nothing of a pass on their modules; some do, and so do some methods of PEFT. Which it is the model
itself shows: when two threads first want it at once, two passes are taken step by step, each module after the other
pass has got there too, and compared with the same passes alone. Until then, and for good where they differ, passes wait
for one another. A model that one thread runs is never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tasks.adapters.prompt_tuning import for_generation
from tasks.inference.agreement import holds, known, turn_of
from tasks.models.decoder import made_up_tokens, unwrapped
from tasks.models.loader import Model

PassT = TypeVar("PassT")

_STEP_S = 30.0
"""How long a pass waits for the other one to get to the same module."""


@contextmanager
def in_turn(model: Model) -> Iterator[None]:
    """Take a pass through a model that other threads may be using: beside theirs if it may, else after them."""
    claim = _claim(model)
    if known(unwrapped(model), claim):
        yield
        return
    turn = turn_of(unwrapped(model))
    alone = turn.acquire(blocking=False)
    if not alone:
        turn.acquire()
    try:
        if alone or not passes_side_by_side(model):
            yield
            return
    finally:
        turn.release()
    yield


def passes_side_by_side(model: Model) -> bool:
    """Return whether passes of several threads through a model give what each gives alone, and through its base."""
    base = unwrapped(model)
    return (model is base or passes_side_by_side(base)) and holds(
        base, _claim(model), partial(_beside_and_alone, model)
    )


def _claim(model: Model) -> str:
    """Name what is to be found out: another thing of the base and of PEFT's model, and with each method's adapters."""
    kinds = sorted({str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values()})
    return " ".join(["passes may stand beside each other:", type(model).__name__, *kinds])


def _beside_and_alone(model: Model) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate after a prompt, and more after two others with padding before one of them: in step, and alone.

    In step that is a copy of the modules with the same weights: what two passes make of their state stays there.
    """
    one = made_up_tokens(model, [1, 2, 3, 4, 5, 6, 7])
    two = made_up_tokens(model, [8, 9, 10, 11], [0, 0, 12, 13])
    passes = [(one, 0, 2), (two, 2, 4)]
    with ThreadPoolExecutor(1) as other:  # in a thread without this one's settings, such as that nothing is edited
        alone = [other.submit(_logits, model, *each).result() for each in passes]
    copied = deepcopy(model, {id(weight): weight for weight in model.parameters()})
    yield from zip(in_step(copied, [partial(_logits, copied, *each) for each in passes]), alone, strict=True)


@torch.no_grad()
def _logits(model: Model, ids: Tensor, padding: int, tokens: int) -> Tensor:
    """Compute the logits of so many tokens after each prompt, of which the last begins with padding: (all, vocab)."""
    attended = torch.ones_like(ids)
    attended[-1, :padding] = 0
    written: Any = for_generation(model).generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=attended,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = torch.cat(written.logits)
    return logits


def in_step(model: Model, passes: Sequence[Callable[[], PassT]]) -> list[PassT]:
    """Run passes in a thread each, such that none goes into a module before all others have got there, too.

    When one has ended the others go on by themselves.

    Raises:
        Exception: what a pass raises.
        BrokenBarrierError: one did not get to a module that the others had got to.
    """
    step = Barrier(len(passes), timeout=_STEP_S)
    found: dict[int, PassT] = {}
    errors: list[Exception] = []
    ended: list[int] = []

    def wait(module: nn.Module, args: tuple[Any, ...]) -> None:
        try:
            step.wait()
        except BrokenBarrierError:
            if not ended:
                raise

    def run(number: int) -> None:
        try:
            with torch.no_grad():
                found[number] = passes[number]()
        except Exception as error:  # is raised where the passes are wanted
            errors.append(error)
        finally:
            ended.append(number)
            step.abort()

    handles = [module.register_forward_pre_hook(wait) for module in unwrapped(model).modules()]
    try:
        threads = [Thread(target=run, args=(number,)) for number in range(len(passes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for handle in handles:
            handle.remove()
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(passes))]
