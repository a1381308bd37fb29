"""What surrounds a run: holding the workspace, putting it in order, and showing what came out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows import comparison_page, data_page, display, estimating, servers
from flows.results import read_results, table
from flows.workspace import held, keep_lock_copy, put_in_order
from tasks import graph
from tasks.params import Params
from tasks.params_reading import load
from tasks.registry import find_version
from tasks.runner import Session, opened
from tasks.signals import still_on_stop
from tasks.stages import TRAINING
from tasks.tracking import connect


@contextmanager
def begin(workspace: Path) -> Iterator[Session]:
    """Opens a session: its stages run while the workspace is held and in order.

    Raises:
        BadParams: params.yaml is wrong.
        WorkspaceBusy: another run holds the workspace.
    """
    logger = get_run_logger()
    params = load(workspace / graph.PARAMS)
    with held(workspace, "temper run"):
        for done in put_in_order(workspace):
            logger.warning(done)
        if servers.temporary():
            servers.note_server(workspace)
        if dead := servers.mark_dead_runs("retrain", workspace, flow_run.id):
            logger.warning(f"marked {dead} earlier runs as crashed: their processes are gone")
        servers.limit_trainings(TRAINING)
        forget_lost_versions(workspace, params)
        with opened(workspace, params, display.watching(), partial(estimating.advice, workspace)) as session:
            try:
                with still_on_stop():
                    yield session
            finally:
                keep_lock_copy(workspace)
        if all(outcome.state == "unchanged" for outcome in session.outcomes.values()):
            logger.info("nothing has changed since the last run")


def forget_lost_versions(workspace: Path, params: Params) -> None:
    """Removes the note of a registration that this registry does not have, so that the stage runs again.

    DVC knows the note, not the registry: after a change of server, or without `.temper/`, it would call the stage up
    to date.
    """
    notes = [workspace / node.outs[0] for name, node in graph.load(workspace).items() if name.startswith("register@")]
    notes = [note for note in notes if note.is_file()]
    client = connect(workspace) if notes else None
    for note in notes:
        if client and not find_version(client, params.register_.model, json.loads(note.read_text())["key"]):
            get_run_logger().warning(f"{note.relative_to(workspace)} names a version that this registry does not have")
            note.unlink()


def show_results(workspace: Path) -> None:
    """Publishes the table of models and the profile of the data as Prefect artifacts that link to MLflow."""
    results = read_results(workspace)
    client = connect(workspace)
    if data := data_page.publish(client, workspace):
        link = servers.run_link(workspace, data.info.experiment_id, data.info.run_id)
        create_link_artifact(f"{link}/artifacts", link_text="The data of this run", key="data")
    lines = ["| model | exact match | gain over base | loss | version | run |", "|---|---|---|---|---|---|"]
    for result, row in zip(results, table(results), strict=True):
        link = ""
        if result.run:
            experiment = client.get_run(result.run).info.experiment_id
            link = f"[MLflow]({servers.run_link(workspace, experiment, result.run)})"
        lines.append("| " + " | ".join([*row.values(), link]) + " |")
    create_markdown_artifact("\n".join(lines), key="methods", description="Every model on the held-out rows")


def show_comparison(workspace: Path) -> Path:
    """Writes the page that compares all models, logs it to MLflow and links it from this flow run."""
    page, client = comparison_page.write(workspace), connect(workspace)
    run = comparison_page.publish(client, workspace, page)
    link = servers.run_link(workspace, run.info.experiment_id, run.info.run_id)
    create_link_artifact(f"{link}/artifacts", link_text="All models compared", key="comparison")
    return page
