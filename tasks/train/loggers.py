"""Reporting of a training log beside MLflow, as `report_to` names it: TensorBoard, Weights & Biases.

Neither package is one of temper's: users install them. The training log, an output of the stage, has every
row anyway. Where several processes train, only the first reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tasks.core.errors import BadParams
from tasks.core.ranks import is_first
from tasks.reports.training_log import SAMPLES, numbers_of


class TrainingLogger(Protocol):
    """One place where rows of a training log go."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row: its `step`, numbers by name, and samples, if there are any."""

    def close(self) -> None:
        """Send what is left."""


@contextmanager
def reports(
    names: Sequence[str], workspace: Path, key: str, title: str, params: Mapping[str, Any]
) -> Iterator[list[TrainingLogger]]:
    """Open what is reported to; a resumed training goes on in the same place.

    Args:
        names: `tensorboard` or `wandb`, each called like its package.
        workspace: TensorBoard's files are in its .temper/tensorboard.
        key: the content key of the training.
        title: the name of the run.
        params: shown beside it.

    Raises:
        BadParams: a package is missing, or does not start.
    """
    check_installed(names)
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    with ExitStack() as stack:
        made: list[TrainingLogger] = []
        for name in names if is_first() else ():
            made.append(kinds[name](workspace, key, title, params))
            stack.callback(made[-1].close)
        yield made


def check_installed(names: Sequence[str]) -> None:
    """Refuse names whose packages are not there.

    Raises:
        BadParams: one or more are missing.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise BadParams(
            "what is to be reported to is not installed",
            where="train.*.report_to",
            got=", ".join(missing),
            fix=f"pip install {' '.join(missing)}, or take it out of report_to",
        )


class TensorBoard:
    """Event files for `tensorboard --logdir .temper/tensorboard`."""

    def __init__(self, workspace: Path, key: str, title: str, params: Mapping[str, Any]) -> None:
        self._folder = workspace / ".temper" / "tensorboard" / f"{title.replace(' ', '-')}-{key}"
        self._writer: Any = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers as scalars and the samples as text."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # what a killed attempt wrote from this step on is not shown
            self._writer = SummaryWriter(str(self._folder), purge_step=row["step"])
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, row["step"])
        for place, sample in enumerate(row.get(SAMPLES, ())):
            self._writer.add_text(f"{SAMPLES}/{place}", f"{sample['prompt']}\n\n{sample['reply']}", row["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer:
            self._writer.close()


class WeightsAndBiases:
    """A run of project `temper`; the key is its id. WANDB_* variables say where, and `WANDB_MODE=offline` nowhere."""

    def __init__(self, workspace: Path, key: str, title: str, params: Mapping[str, Any]) -> None:
        import wandb

        folder = workspace / ".temper"
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            self._run = wandb.init(
                project="temper", id=key, name=title, config=dict(params), dir=str(folder), resume="allow"
            )
        except (wandb.errors.Error, OSError) as error:
            raise BadParams(
                "Weights & Biases does not start",
                where="train.*.report_to",
                got=str(error).split("\n")[0],
                fix="log in by `wandb login`, set WANDB_MODE=offline, or take wandb out of report_to",
            ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the numbers; skip steps that the run has already."""
        self._run.log(numbers_of(row), step=row["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
