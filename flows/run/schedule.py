"""The schedule: `retrain` as a Prefect deployment, served from this workspace.

The deployment is kept by the Prefect server: the user's own, or one on this machine that serving starts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from zoneinfo import available_timezones

from flows.run import prefect_server
from flows.run.feedback import state
from flows.run.lock import held
from flows.run.prefect_runs import FACTORY
from tasks.core.errors import BadParams, TemperError
from tasks.core.stage import OWNER

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
RUN_ENDS_S, _ENDS_S = 45, 20
"""So long a run may take to end when it is stopped, its stages' STOP_S included, and what serves it after that."""


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


_FIELDS = {"minutes": 60, "hours": 24, "days of the month": None, "months": 12, "days of the week": 7}
"""The fields of a cron line, and how many values one goes round; months differ in their days."""


def check_cron(text: str, timezone: str = "UTC") -> list[datetime]:
    """Check that a cron line says what it seems to say.

    Args:
        text: five fields.
        timezone: the name of the time zone that they are of, such as Europe/Berlin.

    Returns:
        The next three dates.

    Raises:
        BadParams: it is no such line, its days never come, or a step does not divide what it goes round.
    """
    from prefect.server.schemas.schedules import CronSchedule

    where, expected = f'--cron "{text}"', 'five fields, such as "0 3 * * *"'
    fields = text.split()
    if len(fields) in (6, 7):
        got = f"{len(fields)} fields; the sixth would be read as seconds, and a seventh as years"
        raise BadParams("is not a cron schedule", where=where, got=got, expected=expected)
    if timezone not in available_timezones():
        named = "a name such as UTC or Europe/Berlin"
        raise BadParams("is not a time zone", where=f"--timezone {timezone}", expected=named)
    try:
        schedule = CronSchedule(cron=text, timezone=timezone)
    except ValueError as error:
        raise BadParams(
            "is not a cron schedule",
            where=where,
            got=next((line.strip() for line in str(error).split("\n") if "alue error" in line), str(error)),
            expected=expected,
        ) from error
    try:
        dates = [datetime.fromisoformat(date.isoformat()) for date in asyncio.run(schedule.get_dates(3))]
    except ValueError:  # it has looked through fifty years
        dates = []
    if len(dates) < 3:
        raise BadParams("names days that never come", where=where, got="no date in the next fifty years")
    for (name, values), field in zip(_FIELDS.items(), fields, strict=False):
        step = re.fullmatch(r"\*/(\d+)", field)
        if step and int(step[1]) > 1 and (values is None or values % int(step[1])):
            raise BadParams(
                f"has a step that does not divide the {name}",
                where=where,
                got=f"{field}, which begins anew with every round: the last gap would be shorter than {step[1]}",
                expected=f"the {name} one by one, such as {','.join(str(each) for each in _some(name, int(step[1])))}",
            )
    return dates


def _some(name: str, step: int) -> range:
    """Return the values that a step in a field means, from its first on."""
    first = 1 if name in ("days of the month", "months") else 0
    return range(first, first + (_FIELDS[name] or 31), step)


def name_of(workspace: Path) -> str:
    """Return the name of the deployment: the workspace folder and a digest of its path, as a server may serve many."""
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", workspace.name).strip("-")
    return f"{folder or 'workspace'}-{hashlib.sha256(str(workspace).encode()).hexdigest()[:6]}"


class Serving(NamedTuple):
    """A schedule that is served: of a cron line in a time zone, or every so often.

    Attributes:
        workspace: an absolute path.
        cron: a cron line, or None.
        timezone: the name of its time zone.
        every_s: an interval in seconds, or None.
        on_feedback: so many new rows of what people said start a run, too; None: none do. Each run renews the
            snapshots of them first, then.
        on_drift: where something has drifted by this limit one such row is enough; None: nothing is looked at.
    """

    workspace: str
    cron: str | None
    timezone: str
    every_s: float | None
    on_feedback: int | None = None
    on_drift: float | None = None


def serve(serving: Serving) -> NoReturn:
    """Serve the schedule until a signal ends it.

    Prefect does so in a process of its own, and with it the runs: the signals of a terminal do not reach them there.

    Raises:
        BadParams: feedback is waited for, and there is no source or no record of it.
        WorkspaceBusy: another process serves it.
        TemperError: Prefect gave up.
    """
    workspace = Path(serving.workspace)
    if serving.on_feedback:
        state(workspace)  # so that a record that is not there is told now
    with held(workspace, "temper schedule", "schedule.lock"), prefect_server.kept_up(workspace, shared=True):
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.run.schedule_process", json.dumps(serving)],
            cwd=workspace,
            env={**os.environ, OWNER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            prefect_server.end_process(process, RUN_ENDS_S + _ENDS_S)
    raise TemperError("Prefect serves the schedule no more", got=f"its process ended with code {code}")


def listed() -> list[Scheduled]:
    """List every schedule that the Prefect server knows for this flow."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[FACTORY])))
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


def is_paused(workspace: Path) -> bool:
    """Return whether the schedule of this workspace is there and paused."""
    try:
        with _deployment(workspace) as (_, deployment):
            return deployment.paused
    except BadParams:
        return False  # it is not there yet


@contextmanager
def _deployment(workspace: Path) -> Iterator[tuple[SyncPrefectClient, DeploymentResponse]]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = f"{FACTORY}/{name_of(workspace)}"
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
