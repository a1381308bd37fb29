"""Runs that new feedback starts: a schedule looks at the record every so often, and makes a run when there is enough.

It is the schedule's own deployment that runs, so that never two do. The run itself renews the snapshots, while it holds
the workspace. What is waited for is rows that the snapshots lack, so that nothing has to be remembered: a kill at any
moment loses none of them. A run that was cut short by one is started once more, by the next schedule or this one.

Before a run is made the event `temper.feedback.enough` is emitted, for whatever else a Prefect server shall do then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.run.feedback import records, state, waiting, was_cut_short
from flows.run.lock import held
from flows.run.prefect_runs import FACTORY
from flows.run.schedule import name_of
from tasks.core.errors import TemperError, WorkspaceBusy

LOOK_S = 10.0
EVENT = "temper.feedback.enough"


@dataclass
class DriftWatch:
    """Tells whether what is asked or answered has drifted; looks every half hour, and rests after a run was made of it.

    Args:
        workspace: whose records and training rows they are.
        limit: of the stability index, beyond what chance gives.
        clock: seconds, which only go forward.
    """

    workspace: Path
    limit: float
    clock: Callable[[], float] = time.monotonic
    _rests_until: float = -math.inf
    _reasons: tuple[str, ...] = ()

    def reasons(self) -> tuple[str, ...]:
        """Return what drifted, in words.

        Raises:
            TemperError: nothing was trained yet, or a record does not answer.
        """
        if self.clock() >= self._rests_until:
            from flows.serve.drift import EVERY_S, drift_of, drifted

            found = [drift_of(self.workspace, place) for place in records(self.workspace)]
            self._reasons = tuple(reason for each in found for reason in drifted(each, self.limit))
            self._rests_until = self.clock() + EVERY_S
        return self._reasons

    def rest(self) -> None:
        """Say nothing for as many days as are looked at: until then what drifted is seen with what a run made of it."""
        from flows.serve.drift import DAYS
        from flows.serve.recorded import DAY_S

        self._reasons, self._rests_until = (), self.clock() + DAYS * DAY_S


@dataclass
class Listener:
    """Tells when a run is due.

    Args:
        workspace: whose record it is.
        at_least: so many new rows are enough.
        drift: where something has drifted, one new row is enough; None: nothing is looked at.
    """

    workspace: Path
    at_least: int
    drift: DriftWatch | None = None
    _seen: list[tuple[int, int]] | None = None
    _waiting: int = 0
    _told: int = 0
    """So many rows waited when a run was made of them: where it failed, it is not made again of the same."""
    _cut_short: bool = False
    _resumed: bool = False

    def due(self) -> int | None:
        """Return how many new rows there are, if a run is due; None where it is not, and while another one goes on.

        Raises:
            TemperError: params.yaml is wrong, or a record does not answer.
        """
        if not self._is_due():
            return None
        try:
            with held(self.workspace, "temper schedule"):
                return self._waiting if self._is_due() else None  # a run may have gone on at the first look
        except WorkspaceBusy:
            return None

    def _is_due(self) -> bool:
        self._cut_short = was_cut_short(self.workspace)
        if (seen := state(self.workspace)) != self._seen:
            self._waiting = waiting(self.workspace)
            self._seen = seen
        self._told = min(self._told, self._waiting)
        new = self._waiting - self._told
        enough = new >= self.at_least or (new > 0 and self.drift is not None and bool(self.drift.reasons()))
        return enough or (self._cut_short and not self._resumed)

    def made(self) -> None:
        """Note that the run that was due has been made."""
        self._told, self._resumed = self._waiting, self._resumed or self._cut_short
        if self.drift:
            self.drift.rest()


def listen(workspace: Path, at_least: int, drift_limit: float | None = None) -> None:
    """Make a run of the schedule whenever it is due, for as long as the process lasts."""
    from httpx import HTTPError
    from prefect.exceptions import PrefectException

    drift = None if drift_limit is None else DriftWatch(workspace, drift_limit)
    listener, said = Listener(workspace, at_least, drift), ""
    while True:
        time.sleep(LOOK_S)
        try:
            rows = listener.due()
            if rows is not None and make_run(workspace, rows):
                listener.made()
                print(f"{rows} new rows of feedback: a run is made", flush=True)
            said = ""
        except (TemperError, PrefectException, HTTPError, OSError, RuntimeError) as error:
            if said != (said := str(error)):  # once, not at every look
                print(f"feedback cannot be looked at now: {error}", flush=True)


def make_run(workspace: Path, rows: int) -> bool:
    """Emit the event and make a run of the schedule's deployment; return False where that is paused or not there yet.

    Args:
        workspace: whose schedule it is.
        rows: that are new, for the event.
    """
    from prefect.client.orchestration import get_client
    from prefect.events import emit_event
    from prefect.exceptions import ObjectNotFound

    name = name_of(workspace)
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{FACTORY}/{name}")
        except ObjectNotFound:
            return False
        if deployment.paused:
            return False
        resource = {"prefect.resource.id": f"temper.workspace.{name}", "prefect.resource.name": str(workspace)}
        emit_event(EVENT, resource=resource, payload={"rows": rows})
        client.create_flow_run_from_deployment(deployment.id, name=f"feedback-{rows}")
        return True
