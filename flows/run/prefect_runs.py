"""Runs as Prefect's server knows them: limits, and runs that died."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from flows.run.prefect_server import temporary


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


def mark_dead_runs(flow_name: str, workspace: Path, but: str | None) -> int:
    """Mark this workspace's runs that their killed processes left as running as crashed; return how many.

    The caller holds the workspace, so none of them can be alive.
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

    running = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])), flow_run_filter=FlowRunFilter(state=running)
        )
        dead = [run for run in runs if str(run.id) != but and str(run.parameters.get("workspace")) == str(workspace)]
        for run in dead:
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
    return len(dead)
