"""Schedules of the learning rate: those of transformers, as functions of the step alone."""

from __future__ import annotations

from collections.abc import Callable

from tasks.engine.params import Schedule, WarmupStableDecay


def learning_rates(schedule: Schedule, *, peak: float, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """Make the function that gives the learning rate at a step, counted from 0.

    The warm-up is linear and reaches the peak at its last step. transformers' begins at zero, in a step that would
    change nothing, so each of its steps is taken one later; linear and cosine would reach zero one step after the last.

    Args:
        schedule: what follows the warm-up: `constant`; `linear` or `cosine` to zero; or warm-up, stable, decay.
        peak: the highest rate.
        warmup_steps: the steps of the warm-up.
        steps: of the whole training.
    """
    from torch import zeros
    from torch.optim import SGD
    from transformers import get_scheduler, get_wsd_schedule

    whose = SGD([zeros(1)], lr=peak)  # schedulers are made for an optimizer
    if isinstance(schedule, WarmupStableDecay):
        decay_steps = max(0, min(round(schedule.wsd * steps), steps - warmup_steps))
        stable_steps = max(0, steps - warmup_steps - decay_steps)
        made = get_wsd_schedule(
            whose, warmup_steps, decay_steps, num_stable_steps=stable_steps, decay_type="1-sqrt", min_lr_ratio=0
        )
    else:
        name = "constant_with_warmup" if schedule == "constant" else schedule
        made = get_scheduler(name, whose, num_warmup_steps=warmup_steps, num_training_steps=steps)
    (share,) = made.lr_lambdas
    return lambda step: float(peak * share(step + 1 if step < warmup_steps else step))
