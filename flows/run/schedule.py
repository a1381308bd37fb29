"""The schedule: `retrain` as a Prefect deployment, served from this workspace.

The deployment is kept by the Prefect server: the user's own, or one on this machine that serving starts. Serving is a
loop. When the server goes away the loop waits for it, and starts its own anew; the deployment is then found as it
was.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.run import prefect_server
from tasks.core.errors import BadParams

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

FLOW = "retrain"
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_WAIT_S = 5


class Scheduled(NamedTuple):
    """A deployment as a person reads it."""

    name: str
    schedule: str
    paused: bool
    workspace: str
    next_run: str


def parse_interval(text: str) -> timedelta:
    """`30m`, `6h` or `1d` as a span of time.

    Raises:
        BadParams: it is none of these, or shorter than a minute.
    """
    match = re.fullmatch(r"([1-9][0-9]*)([mhd])", text)
    if not match:
        raise BadParams("is not an interval", where=f"--every {text}", expected="a number and m, h or d, such as 6h")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def check_cron(text: str) -> str:
    """Check that a text is a cron line of five fields.

    Raises:
        BadParams: it is not one.
    """
    from prefect.client.schemas.schedules import CronSchedule

    try:
        return CronSchedule(cron=text, timezone="UTC").cron
    except ValueError as error:
        raise BadParams(
            "is not a cron schedule",
            where=f'--cron "{text}"',
            got=next((line.strip() for line in str(error).split("\n") if "alue error" in line), str(error)),
            expected='five fields, such as "0 3 * * *"',
        ) from error


def name_of(workspace: Path) -> str:
    """Return the name of the deployment: the workspace folder and a digest of its path, as a server may serve many."""
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", workspace.name).strip("-")
    return f"{folder or 'workspace'}-{hashlib.sha256(str(workspace).encode()).hexdigest()[:6]}"


def serve(workspace: Path, *, cron: str | None, every: timedelta | None) -> None:
    """Serve the schedule until it is stopped; do not return before."""
    from prefect.exceptions import PrefectException
    from prefect.types.entrypoint import EntrypointType

    from flows.retrain import retrain
    from flows.run.lock import held

    os.chdir(workspace)
    # its way of stopping on SIGTERM, which works, calls coroutines that it does not await
    warnings.filterwarnings("ignore", message="coroutine 'Runner", category=RuntimeWarning)
    with held(workspace, "temper schedule", "schedule.lock"), prefect_server.kept_up(workspace) as api:
        while True:
            prefect_server.wait_for(api)
            try:
                retrain.serve(
                    name=name_of(workspace),
                    cron=cron,
                    interval=every,
                    paused=_is_paused(workspace),
                    parameters={"workspace": str(workspace)},
                    limit=1,
                    pause_on_shutdown=False,
                    print_starting_message=False,
                    entrypoint_type=EntrypointType.MODULE_PATH,
                )
                return
            except (
                PrefectException,
                RuntimeError,
                OSError,
            ) as error:  # the runner gives up after a long outage of its server
                print(f"the Prefect server went away ({type(error).__name__}); waiting for it", flush=True)
                time.sleep(_WAIT_S)


def listed() -> list[Scheduled]:
    """List every schedule that the Prefect server knows for this flow."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])))
        return [_described(client, deployment) for deployment in found]


def pause(workspace: Path, *, paused: bool) -> str:
    """Pause or resume the schedule of this workspace; return its name."""
    with _deployment(workspace) as (client, deployment):
        client.pause_deployment(deployment.id) if paused else client.resume_deployment(deployment.id)
        return deployment.name


def remove(workspace: Path) -> str:
    """Remove the schedule of this workspace; return its name."""
    with _deployment(workspace) as (client, deployment):
        client.delete_deployment(deployment.id)
        return deployment.name


def _is_paused(workspace: Path) -> bool:
    try:
        with _deployment(workspace) as (_, deployment):
            return deployment.paused
    except BadParams:
        return False  # it is not there yet


@contextmanager
def _deployment(workspace: Path) -> Iterator[tuple[SyncPrefectClient, DeploymentResponse]]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = f"{FLOW}/{name_of(workspace)}"
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(name)
        except ObjectNotFound as error:
            raise BadParams(
                "there is no such schedule", where=name, fix='make one with: temper schedule --cron "0 3 * * *"'
            ) from error
        yield client, deployment


def _described(client: SyncPrefectClient, deployment: DeploymentResponse) -> Scheduled:
    schedules = [_in_words(each.schedule) for each in deployment.schedules]
    runs = client.get_scheduled_flow_runs_for_deployments([deployment.id])
    upcoming = sorted(run.expected_start_time for run in runs if run.expected_start_time)
    return Scheduled(
        deployment.name,
        ", ".join(schedules) or "none",
        deployment.paused,
        str(deployment.parameters.get("workspace", "")),
        upcoming[0].isoformat(timespec="seconds") if upcoming and not deployment.paused else "",
    )


def _in_words(schedule: Any) -> str:
    return f"cron {schedule.cron}" if hasattr(schedule, "cron") else f"every {schedule.interval}"
