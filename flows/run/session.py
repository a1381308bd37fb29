"""Session around a run: holding the workspace, putting it in order, and showing its results."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.comparison.page import publish_comparison, write
from flows.files import estimate
from flows.registry.promotion import registration_notes
from flows.run import data_page, prefect_runs, prefect_server, progress_board
from flows.run.ending import Stopped
from flows.run.feedback import renewed
from flows.run.lock import held
from flows.run.repair import keep_lock_copy, put_in_order
from flows.run.status import read_results, results_table
from tasks.core import pipeline
from tasks.core.stage import OWNER, die_with_owner
from tasks.orchestration.dvc_session import PipelineRun, opened, stop_all
from tasks.orchestration.params import Params, load_params
from tasks.orchestration.prefect_tasks import TRAINING
from tasks.registry.client import connect
from tasks.registry.versions import find_version
from tasks.validate.own_expectations import SUITES, own_expectations

_TELL_S = 10


@contextmanager
def begin(workspace: Path, *, feedback: bool = False) -> Iterator[PipelineRun]:
    """Open a session: its stages run while the workspace is held and in order.

    Args:
        workspace: which.
        feedback: whether the snapshots of what people said are renewed first.

    Raises:
        BadParams: params.yaml is wrong, or an expectation that it names; or there is no record of what people said.
        WorkspaceBusy: another run holds the workspace.
    """
    if OWNER in os.environ:  # a schedule's
        die_with_owner()
    logger = get_run_logger()
    params = load_params(workspace / pipeline.PARAMS)
    own_expectations(params.validate_, workspace / SUITES)  # so that a wrong name is told before anything is fetched
    with held(workspace, "temper run"):
        for done in put_in_order(workspace):
            logger.warning(done)
        if dead := prefect_runs.mark_dead_runs(workspace, "its process is gone", but=flow_run.id):
            logger.warning(f"marked {dead} earlier runs as crashed: their processes are gone")
        prefect_runs.limit_trainings(TRAINING)
        forget_lost_versions(workspace, params)
        with ExitStack() as stack:
            for snapshot in stack.enter_context(renewed(workspace)) if feedback else []:
                for line in snapshot.lines():
                    logger.info(line)
            watch, advise = progress_board.watching(), partial(estimate.advice, workspace)
            session = stack.enter_context(opened(workspace, params, watch, advise))
            try:
                yield session
            finally:
                keep_lock_copy(workspace)
        if all(outcome.state == "unchanged" for outcome in session.outcomes.values()):
            logger.info("nothing has changed since the last run")


def stop(workspace: Path, stopped: Stopped) -> None:
    """Stop the stages that this process runs, then tell Prefect of its flow runs that are stopped with it."""
    progress_board.show_note("stopping: trainings write a checkpoint")
    stop_all()
    # a daemon: a server of the user's own that does not answer is not waited for, and the next run tells it
    telling = threading.Thread(target=prefect_runs.mark_dead_runs, args=(workspace, str(stopped)), daemon=True)
    telling.start()
    telling.join(_TELL_S)


def forget_lost_versions(workspace: Path, params: Params) -> None:
    """Remove the note of a registration that this registry does not have, so that the stage runs again.

    DVC knows the note, not the registry: after a change of server, or without `.temper/`, it would call the stage up
    to date.
    """
    notes = registration_notes(workspace)
    client = connect(workspace) if notes else None
    for note, key in notes.items():
        if client and not find_version(client, params.register_.model, key):
            get_run_logger().warning(f"{note.relative_to(workspace)} names a version that this registry does not have")
            note.unlink()


def show_results(workspace: Path) -> None:
    """Publish the table of models and the profile of the data as Prefect artifacts that link to MLflow."""
    results = read_results(workspace)
    client = connect(workspace)
    if data := data_page.publish_data_page(client, workspace):
        link = prefect_server.run_link(workspace, data.info.experiment_id, data.info.run_id)
        create_link_artifact(f"{link}/artifacts", link_text="The data of this run", key="data")
    lines = ["| model | exact match | gain over base | loss | version | run |", "|---|---|---|---|---|---|"]
    for result, row in zip(results, results_table(results), strict=True):
        link = ""
        if result.run:
            experiment = client.get_run(result.run).info.experiment_id
            link = f"[MLflow]({prefect_server.run_link(workspace, experiment, result.run)})"
        lines.append("| " + " | ".join([*row.values(), link]) + " |")
    create_markdown_artifact("\n".join(lines), key="methods", description="Every model on the held-out rows")


def show_comparison(workspace: Path) -> Path:
    """Write the page that compares all models, log it to MLflow and link it from this flow run."""
    page, client = write(workspace), connect(workspace)
    run = publish_comparison(client, workspace, page)
    link = prefect_server.run_link(workspace, run.info.experiment_id, run.info.run_id)
    create_link_artifact(f"{link}/artifacts", link_text="All models compared", key="comparison")
    return page
