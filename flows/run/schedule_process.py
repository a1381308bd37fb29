"""Process in which Prefect serves a schedule and starts its runs; it ends with `temper schedule`, which starts it.

Serving is a loop. When the server goes away the loop waits for it; the deployment is then found as it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

from flows.run.ending import Stopped, aside, stoppable
from flows.run.schedule import RUN_ENDS_S, Serving, is_paused, name_of
from tasks.core.stage import die_with_owner

_WAIT_S = 5


def main() -> None:
    """Serve the schedule that the first argument describes, until a signal comes."""
    die_with_owner()
    serving = Serving(*json.loads(sys.argv[1]))
    with stoppable(silent=True):
        aside(partial(_serve, serving), stop=partial(_end_runs, Path(serving.workspace)))


def _serve(serving: Serving) -> None:
    from httpx import HTTPError
    from prefect.exceptions import PrefectException
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.retrain import retrain
    from flows.run.feedback_runs import listen
    from flows.run.prefect_server import wait_for

    workspace = Path(serving.workspace)
    if serving.on_feedback:
        threading.Thread(target=listen, args=(workspace, serving.on_feedback, serving.on_drift), daemon=True).start()
    while True:
        wait_for(os.environ["PREFECT_API_URL"])
        try:
            retrain.serve(
                name=name_of(workspace),
                schedule=Cron(serving.cron, timezone=serving.timezone) if serving.cron else None,
                interval=timedelta(seconds=serving.every_s) if serving.every_s else None,
                paused=is_paused(workspace),
                parameters={"workspace": serving.workspace, "feedback": bool(serving.on_feedback)},
                limit=1,
                pause_on_shutdown=False,
                print_starting_message=False,
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
        except (PrefectException, RuntimeError, OSError, HTTPError) as error:  # it died, or was away for long
            print(f"the Prefect server went away ({type(error).__name__}); waiting for it", flush=True)
            time.sleep(_WAIT_S)


def _end_runs(workspace: Path, stopped: Stopped) -> None:
    """Let the runs stop their stages and end; kill those that take too long; tell Prefect which it has not heard of."""
    from flows.run.prefect_runs import mark_dead_runs

    deadline = time.monotonic() + RUN_ENDS_S
    runs = multiprocessing.active_children()
    for run in runs:
        run.terminate()  # Prefect ends the flow in there by an exception, and so the session ends that the flow opened
    for run in runs:
        run.join(max(0.0, deadline - time.monotonic()))
        run.kill()
    mark_dead_runs(workspace, str(stopped), scheduled=True)


if __name__ == "__main__":
    main()
