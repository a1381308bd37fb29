"""The whole factory, in order: from sources to a champion. Read this file first.

Every line is a stage of dvc.yaml. Stages that do not wait for each other run at once, as far as their concurrency
tags in tasks/orchestration/prefect_tasks.py let them; a stage whose inputs have not changed is passed over.
"""

# no postponed annotations here: Prefect checks the parameters of scheduled runs by them, and cannot look up names
from pathlib import Path

from prefect import flow
from prefect.futures import wait

from flows.promote import promote
from flows.run.last_run import RunReport
from flows.run.session import begin, show_comparison, show_results
from tasks.orchestration.prefect_tasks import base, baseline, evaluate, ingest, merge, register, render, train, validate


@flow(name="retrain")
def retrain(workspace: Path, promoting: bool = True, feedback: bool = False) -> RunReport:
    """Bring every stage of a workspace up to date, then promote the best method if it passes the gate.

    With `feedback` the snapshots of what people said are renewed first.
    """
    with begin(workspace, feedback=feedback) as session:
        sources = [ingest.submit(source) for source in session.params.ingest.sources]
        clean = validate.submit(wait_for=sources)
        model = base.submit(wait_for=[clean])
        rows = render.submit(wait_for=[clean, model])
        yardstick = baseline.submit(wait_for=[rows])

        registered = []
        for method in session.params.train:
            adapter = train.submit(method, wait_for=[rows])
            merged = merge.submit(method, wait_for=[adapter])
            report = evaluate.submit(method, wait_for=[merged, yardstick])
            registered.append(register.submit(method, wait_for=[report]))

        wait(registered)
        session.check()
        promotion = promote(workspace) if promoting else None
        show_results(workspace)
        comparison = show_comparison(workspace)
        return RunReport(list(session.outcomes.values()), promotion, comparison)
