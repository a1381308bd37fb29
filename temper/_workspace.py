"""A workspace: the whole factory, from params.yaml to a champion."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.registry.promotion import Promotion
    from tasks.orchestration.run_journal import StageResult


@dataclass(frozen=True)
class Run:
    """The results of a run.

    Attributes:
        outcomes: what became of every stage.
        promotion: the gate's word; None where nothing was to be promoted.
        comparison: the page that compares all models.
    """

    outcomes: Sequence[StageResult]
    promotion: Promotion | None
    comparison: Path

    @property
    def champion(self) -> str | None:
        """Return the champion as models:/NAME/VERSION; None where there is none, or nothing was to be promoted."""
        promoted = self.promotion
        return f"models:/{promoted.model}/{promoted.champion}" if promoted and promoted.champion else None


class Workspace:
    """A folder with params.yaml and dvc.yaml.

    Args:
        folder: it, or a folder below it.

    Raises:
        BadParams: there is no workspace.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        from tasks.core import pipeline

        self.root = pipeline.find_workspace(Path(folder).resolve())

    def run(self, *, settings: Sequence[str] = (), promote: bool = True) -> Run:
        """Bring every stage up to date, then promote the best method, as `temper run` does.

        Args:
            settings: values of params.yaml to change first, such as `train.qlora.epochs=2`.
            promote: whether the best method is promoted, if it passes the gate.

        Raises:
            TemperError: stages failed; all of what they said is in one error.
        """
        from flows.run import last_run, prefect_server
        from flows.run.edit_params import change_params
        from flows.run.lock import held

        with chdir(self.root), held(self.root, "temper run"):
            change_params(self.root, None, list(settings))
            prefect_server.prepare_servers(self.root, terminal=False)
            report = last_run.unchanged_report(self.root, promote) if prefect_server.temporary() else None
            if report is None:
                with prefect_server.kept_up(self.root):
                    from flows.retrain import retrain  # not before: Prefect reads its settings when it is imported

                    report = retrain(self.root, promote)
                last_run.keep_report(self.root, report)
        return Run(report.outcomes, report.promotion, report.comparison)
