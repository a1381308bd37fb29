"""The stages as Prefect tasks: one runner, and one table that says how each is retried.

A task runs its stage as `dvc repro --single-item`, in a child process of its own session. So the flow and a bare `dvc
repro` run the same command, DVC decides what is up to date, and a crash or an out-of-memory kill ends a stage and
never the flow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.states import Completed

from tasks.core.errors import BadInput
from tasks.orchestration.dvc_session import current_session
from tasks.orchestration.run_journal import StageResult

TRAINING = "training"
"""The tag whose concurrency limit on the Prefect server says how many trainings run at once."""

MINUTE, HOUR = 60, 3600


class Policy(NamedTuple):
    """Policy of a stage's retries: the waits before each, how long one attempt may take, and its concurrency tags."""

    delays_s: tuple[int, ...]
    timeout_s: int
    tags: tuple[str, ...] = ()


# Bad input (exit code 65) is never retried. A retry of train and base goes on from the last checkpoint.
POLICIES = {
    "ingest": Policy(delays_s=(5, 30, 120), timeout_s=6 * HOUR),
    "validate": Policy(delays_s=(5,), timeout_s=6 * HOUR),
    "base": Policy(delays_s=(5, 30, 120), timeout_s=7 * 24 * HOUR, tags=(TRAINING,)),
    "render": Policy(delays_s=(5,), timeout_s=6 * HOUR),
    "baseline": Policy(delays_s=(5,), timeout_s=24 * HOUR),
    "train": Policy(delays_s=(5, 30, 120), timeout_s=7 * 24 * HOUR, tags=(TRAINING,)),
    "merge": Policy(delays_s=(5,), timeout_s=6 * HOUR),
    "evaluate": Policy(delays_s=(5,), timeout_s=24 * HOUR),
    "register": Policy(delays_s=(5, 30, 120, 600), timeout_s=1 * HOUR),
}


def _worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    return not current_session().stopping and not isinstance(state.result(raise_on_failure=False), BadInput)


def _stage(name: str) -> Task[..., StageResult]:
    policy = POLICIES[name]

    def run(item: str | None = None) -> StageResult:
        session, address = current_session(), f"{name}@{item}" if item else name
        outcome = session.pass_over(address)
        if outcome is None:  # only what really runs takes a slot: asking for one takes seconds
            with concurrency([f"tag:{tag}" for tag in policy.tags]):
                outcome = session.run(address, policy.timeout_s, get_run_logger().info)
        done: Any = Completed(name=outcome.state.capitalize(), message=f"content key {outcome.key}", data=outcome)
        return done  # type: ignore[no-any-return]  # Prefect takes a state for what it holds

    return task(
        name=name,
        task_run_name=f"{name}@{{item}}" if name in PER_ITEM else name,
        retries=len(policy.delays_s),
        retry_delay_seconds=list(policy.delays_s),
        retry_jitter_factor=0.3,
        retry_condition_fn=_worth_retrying,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(run)


PER_ITEM = ("ingest", "train", "merge", "evaluate", "register")
"""Stages that run once per source or method."""

ingest = _stage("ingest")
validate = _stage("validate")
base = _stage("base")
render = _stage("render")
baseline = _stage("baseline")
train = _stage("train")
merge = _stage("merge")
evaluate = _stage("evaluate")
register = _stage("register")
