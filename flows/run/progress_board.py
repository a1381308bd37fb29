"""Terminal display: one bar for the graph and a line for every stage that runs."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tasks.orchestration.dvc_session import PipelineRun
from tasks.orchestration.run_journal import Event

if TYPE_CHECKING:
    from rich.progress import TaskID

_STEPS = re.compile(r"(\d+)/(\d+) (\w+)")


class WithoutTraceback(logging.Formatter):
    """Formats as another formatter does, without tracebacks: errors are told in one readable block at the end."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's message alone."""
        plain = copy.copy(record)  # other handlers, such as that of Prefect's server, get the whole record
        plain.exc_info = plain.exc_text = None
        return self.inner.format(plain)


def plain_logs() -> None:
    """Make Prefect's log lines on this console readable by people who did not write it."""
    for handler in logging.getLogger().handlers:
        if handler.formatter:
            handler.setFormatter(WithoutTraceback(handler.formatter))
        handler.addFilter(lambda record: "did not reach a 'COMPLETED' state" not in record.getMessage())


class Board:
    """Shows a session while it runs; follows `5/120 steps` in the output of stages."""

    def __init__(self, stages: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.session: PipelineRun | None = None
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self._all = self._progress.add_task("stages", total=stages, note="starting Prefect")
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Show a text beside the bar for the graph."""
        self._progress.update(self._all, note=text)

    def show(self, event: Event) -> None:
        """Show one event of the session."""
        if event.state == "running":
            self._running(event)
            return
        if event.stage in self._rows:
            self._progress.remove_task(self._rows.pop(event.stage))
        if event.state == "failed":
            self._progress.console.print(f"[red]failed[/]     {event.stage}")
            return
        self._progress.update(self._all, advance=1, note="")
        if event.state != "unchanged":
            self._progress.console.print(f"[green]{event.state:<10}[/] {event.stage}", highlight=False)

    def _running(self, event: Event) -> None:
        if event.stage not in self._rows:
            self._rows[event.stage] = self._progress.add_task(event.stage, total=None, note="")
            self._progress.update(self._all, note="")
        row, steps = self._rows[event.stage], _STEPS.search(event.line)
        if steps:
            self._progress.update(
                row, completed=int(steps[1]), total=int(steps[2]), note=event.line[steps.end() :].strip(", ")[:40]
            )


_board: ContextVar[Board | None] = ContextVar("board", default=None)


@contextmanager
def on_board(stages: int, *, terminal: bool) -> Iterator[None]:
    """Show the sessions that begin within this block, when there is a terminal to show them in."""
    if not terminal:
        yield
        return
    with Board(stages) as board:
        token = _board.set(board)
        try:
            yield
        finally:
            _board.reset(token)


def show_note(note: str) -> None:
    """Show a note beside the bar for the graph, where there is a board."""
    if board := _board.get():
        board.note(note)


def watching() -> Callable[[Event], None]:
    """Return the function that a session calls with its events."""
    board = _board.get()
    return board.show if board else lambda event: None
