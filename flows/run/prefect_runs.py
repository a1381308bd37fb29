"""Runs as Prefect's server knows them: limits, and runs that died."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from uuid import UUID

from flows.run.prefect_server import temporary

FACTORY, PROMOTION = "retrain", "promote"
"""The names of the flows."""


def limit_trainings(tag: str, limit: int = 1) -> None:
    """Limit how many trainings run at once.

    On a server of the user's own an existing limit stands as it is. A temporary server forgets who held its slots
    when it dies, while the count of them stays in its database; as nobody else uses that database, the limit is made
    anew.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        if temporary():
            with suppress(ObjectNotFound):  # the first run
                client.delete_concurrency_limit_by_tag(tag)
        else:
            with suppress(ObjectNotFound):
                client.read_concurrency_limit_by_tag(tag)
                return
        client.create_concurrency_limit(tag, limit)


def adopt_runs(workspace: Path) -> None:
    """Make the runs in a workspace's own Prefect database its own, where it was moved or copied since.

    No server may be running on it.
    """
    database = workspace / ".temper" / "prefect" / "prefect.db"
    if not database.is_file():
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        if connection.execute("select 1 from sqlite_master where name = 'flow_run'").fetchone():
            own = "update flow_run set parameters = json_set(parameters, '$.workspace', ?)"
            connection.execute(f"{own} where json_extract(parameters, '$.workspace') <> ?", (str(workspace),) * 2)


def mark_dead_runs(workspace: Path, why: str, *, but: UUID | str | None = None, scheduled: bool = False) -> int:
    """Mark this workspace's runs that have no process any more, but not an end either, as crashed.

    Args:
        workspace: the runs are of its flows.
        why: what became of their processes.
        but: the id of the run that goes on.
        scheduled: whether it is about the runs of a schedule alone, of which some may not have begun; otherwise about
            all that have begun, and the caller holds the workspace, so that none of them can be alive.

    Returns:
        How many runs of the whole factory there were: each may have a promotion within, which is marked as well.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    begun = [StateType.RUNNING, StateType.PAUSED]
    states = FlowRunFilterStateType(any_=[*begun, StateType.PENDING, StateType.CANCELLING] if scheduled else begun)
    count = 0
    with get_client(sync_client=True) as client:
        for name in (FACTORY, PROMOTION):
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[name])),
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states)),
            )
            dead = [
                run for run in runs if str(run.id) != str(but) and run.parameters.get("workspace") == str(workspace)
            ]
            for run in dead if not scheduled else [run for run in dead if run.deployment_id]:
                client.set_flow_run_state(run.id, Crashed(message=why), force=True)
                count += name == FACTORY
    return count
