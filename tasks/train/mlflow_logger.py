"""The MLflow run of a training: found by the content key of the stage, so that a retry continues it.

A tracker never stands in the way of a training. It works in a thread of its own; when MLflow does not answer it says
so once and asks again now and then, and the training log, an output of the stage, keeps every row. `register` completes
the run from it. Where several processes train, only the first tracks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, Queue
from types import MappingProxyType, TracebackType
from typing import Any

from tasks.core.errors import RegistryUnreachable, Transient
from tasks.core.ranks import is_first
from tasks.registry.client import KEPT_LOSS, connect, log_data, log_params, log_rows, log_samples, logged_steps, run_of

_FLUSH_S = 2.0

_AGAIN_S = 60.0
"""So long after MLflow did not answer it is asked again."""


class Tracker:
    """Sends a training's params, what it reads, and its log rows to MLflow in the background.

    Args:
        workspace: whose MLflow it is.
        key: the content key of the training.
        name: of the run, when it is made.
        tags: of the run, when it is made.
        params: by dotted names.
        data: the digests of what it reads, as `log_data` takes them.
    """

    def __init__(
        self,
        workspace: Path,
        key: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        data: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._identity = (workspace, key, name, tags)
        self._params, self._data = params, data
        self._rows: Queue[dict[str, Any]] = Queue()
        self._unsent: list[dict[str, Any]] = []
        self._closing = threading.Event()
        self._outcome, self._tracks = "RUNNING", is_first()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> Tracker:
        if self._tracks:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome = "FINISHED" if kind is None else "KILLED" if issubclass(kind, Transient) else "FAILED"
        self._closing.set()
        if self._tracks:
            self._thread.join(timeout=60)

    def log(self, row: dict[str, Any]) -> None:
        """Queue one row; it has a `step`, numbers, and samples now and then."""
        if self._tracks:
            self._rows.put(row)

    def _work(self) -> None:
        """Follow the training; while MLflow does not answer, wait, and then send what has gathered."""
        from mlflow.exceptions import MlflowException

        told = False
        while True:
            try:
                return self._follow()
            except (RegistryUnreachable, MlflowException, OSError) as error:
                if not told:
                    said = "it is asked again now and then, and `register` will send what is missing"
                    print(f"not tracked in MLflow; {said}: {error}", flush=True)
                told = True
            if self._closing.wait(_AGAIN_S):
                return None

    def _follow(self) -> None:
        client = connect(self._identity[0])
        run = run_of(client, *self._identity)
        client.update_run(run.info.run_id, status="RUNNING")
        log_params(client, run, self._params)
        if self._data:
            log_data(client, run, self._data)
        sent, kept = logged_steps(client, run), KEPT_LOSS in run.data.metrics

        def is_new(row: Mapping[str, Any]) -> bool:  # a retry repeats the steps since its checkpoint
            return row["step"] not in sent if "loss" in row else not kept

        while not (self._closing.is_set() and self._rows.empty() and not self._unsent):
            self._closing.wait(_FLUSH_S)
            self._unsent += self._waiting()
            log_rows(client, run, [row for row in self._unsent if is_new(row)])
            log_samples(client, run, self._unsent)
            self._unsent.clear()
        client.set_terminated(run.info.run_id, self._outcome)

    def _waiting(self) -> list[dict[str, Any]]:
        rows = []
        while True:
            try:
                rows.append(self._rows.get_nowait())
            except Empty:
                return rows
