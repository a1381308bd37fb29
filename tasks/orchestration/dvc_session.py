"""Runs stages as processes of one session, which holds the workspace while it lasts.

The session knows from one `dvc status` at its start which stages are up to date; a stage that is, and that nothing in
this session has fed anew, is passed over without a process. Everything else is DVC's decision.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core import pipeline
from tasks.core.errors import BadInput, Interrupted, OutOfMemory, TemperError, Transient
from tasks.core.memory import kills_for_memory
from tasks.core.signals import kill_group
from tasks.core.stage import OWNER, words_of
from tasks.orchestration.fork_server import Command, ForkedProcess, ForkServer
from tasks.orchestration.params import Params
from tasks.orchestration.run_journal import Event, StageResult, record

if TYPE_CHECKING:
    import psutil


Process = subprocess.Popen[str] | ForkedProcess

STOP_S = 30
"""A stage that is asked to stop has so long to write a checkpoint."""
_LOOK_S = 0.1
_SHOWN_LINES = 30


@dataclass
class PipelineRun:
    """One run of the graph over one workspace."""

    workspace: Path
    params: Params
    nodes: Mapping[str, pipeline.Node]
    keys: Mapping[str, str]
    """The content keys of the stages' last successes, when the session began."""
    changed: frozenset[str]
    """Stages that `dvc status` found changed then."""
    watch: Callable[[Event], None] = lambda event: None
    advise: Callable[[str], str] = lambda method: ""
    """What a method's training would need and what would fit, for when it ran out of memory."""
    stopping: bool = False
    outcomes: dict[str, StageResult] = field(default_factory=dict)
    errors: dict[str, TemperError] = field(default_factory=dict)
    """What went wrong last in stages that have not come through."""
    _children: set[Process] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: ForkServer | None = None
    """Started with the first stage that has to run."""

    def pass_over(self, stage: str) -> StageResult | None:
        """Return the outcome of a stage that need not run; None for one that must be left to DVC.

        Raises:
            Interrupted: the run is being stopped.
        """
        self._go_on(stage)
        return self._finish(StageResult(stage, "unchanged", 0.0, self.keys[stage])) if self.is_current(stage) else None

    def run(self, stage: str, timeout_s: float, log: Callable[[str], None]) -> StageResult:
        """Run one stage by DVC, to bring it up to date, and return its outcome.

        Args:
            stage: its DVC name.
            timeout_s: seconds after which the stage is killed.
            log: gets every line of its output.

        Raises:
            BadInput: the stage exited with 65.
            OutOfMemory: it exited with 71, or was ended by the kernel for its memory; then `advise` is called.
            Transient: it exited with 75, took too long, or DVC was held up by another process.
            TemperError: it failed in any other way.
        """
        started = time.monotonic()
        self.watch(Event(stage, "running"))
        try:
            state = self._dvc_repro(stage, timeout_s, log)
        except TemperError as failure:
            error = self._with_advice(stage, failure)
            self.errors[stage] = error
            self.watch(Event(stage, "failed"))
            raise error from failure
        outcome = StageResult(stage, state, time.monotonic() - started, pipeline.recorded_keys(self.workspace)[stage])
        log(f"content key {outcome.key}")
        return self._finish(outcome)

    def check(self) -> None:
        """Raise what went wrong, if anything did, all of it in one error.

        A stage that neither passed nor gave a reason (its task failed around it) is a failure too: what follows would
        promote on stale reports.
        """
        self._go_on("the run")
        kinds = [type(error) for error in self.errors.values()]
        if kinds:
            worst = next((kind for kind in (OutOfMemory, BadInput, TemperError) if kind in kinds), Transient)
            raise worst("\n\n".join(str(error) for error in self.errors.values()))
        if lost := [stage for stage in self.nodes if stage not in self.outcomes]:
            raise TemperError("stages did not come through", examples=lost, fix="look into the log of their tasks")

    def _go_on(self, what: str) -> None:
        if self.stopping:
            raise Interrupted("goes no further, because the run is being stopped", where=what)

    def _finish(self, outcome: StageResult) -> StageResult:
        with self._lock:
            self.errors.pop(outcome.stage, None)
            self.outcomes[outcome.stage] = outcome
            record(self.workspace, outcome)
        self.watch(Event(outcome.stage, outcome.state))
        return outcome

    def is_current(self, stage: str) -> bool:
        """Return whether the stage was up to date when the session began and reads nothing that was written since."""
        if stage in self.changed:
            return False
        written = [out for o in self.outcomes.values() if o.state != "unchanged" for out in self.nodes[o.stage].outs]
        return not any(pipeline.overlap(dep, out) for dep in self.nodes[stage].deps for out in written)

    def stop(self) -> None:
        """Terminate every running stage after its present step; kill what is left after STOP_S seconds."""
        with self._lock:  # from here on none is started
            self.stopping = True
            running = set(self._children)
        deadline, asked = time.monotonic() + STOP_S, set[int]()
        while running and time.monotonic() < deadline:
            for child in list(running):
                # not DVC and not the shell between them: with those gone, a stage takes itself for an orphan
                for process in _stage_processes(child):  # again and again: DVC may be about to start it
                    if process.pid not in asked:
                        asked.add(process.pid)
                        process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=_LOOK_S)
                    running.discard(child)
        for child in running:
            kill_group(child.pid)

    def close(self) -> None:
        """End the fork server, when no stage is to be run any more."""
        if self._server:
            self._server.close()

    def _start_dvc(self, words: list[str]) -> Process:
        """Start DVC in a session of its own, forked where there is a fork server."""
        command = ["python", "-m", "dvc", *words]
        environment = child_environment()
        with self._lock:
            self._go_on(words[-1])
            child: Process | None = None
            if sys.platform == "linux":
                with suppress(OSError):  # without it a stage takes longer, no more
                    log = self.workspace / ".temper" / "fork-server.log"
                    self._server = self._server or ForkServer(self.workspace, environment, log)
                    child = self._server.start(Command(command, str(self.workspace), environment))
            child = child or subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=self.workspace,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._children.add(child)
            return child

    def _method(self, stage: str) -> str | None:
        name, _, item = stage.partition("@")
        return item if name == "train" else None

    def _killed_for_memory(self, stage: str) -> TemperError:
        """Build the error of a stage that the kernel killed for memory: a training that fits itself may try again."""
        method = self._method(stage)
        if method and self.params.train[method].fit_memory:
            return Transient(
                "the kernel ended it for its memory; it is tried with half as many rows at once", where=stage
            )
        fix = f"set train.{method}.fit_memory: true, or choose what would fit" if method else "take a machine with more"
        return OutOfMemory("the kernel ended it: the machine's memory ran out", where=stage, fix=fix)

    def _with_advice(self, stage: str, error: TemperError) -> TemperError:
        """Add to an error of a training that ran out of memory what it needs and what would fit."""
        method = self._method(stage)
        advice = self.advise(method) if method and type(error) is OutOfMemory else ""
        return OutOfMemory(f"{error}\n{advice}") if advice else error

    def _dvc_repro(self, stage: str, timeout_s: float, log: Callable[[str], None]) -> str:
        child = self._start_dvc(["--wait-for-lock", "repro", "--single-item", stage])
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            kill_group(child.pid)

        kills = kills_for_memory()
        timer = threading.Timer(timeout_s, end)
        timer.start()
        lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        try:
            for line in map(str.rstrip, child.stdout or []):
                if line and not _HINT.match(line):
                    lines.append(line)
                    log(line)
                    self.watch(Event(stage, "running", line))
            code = child.wait()
        finally:
            timer.cancel()
            with self._lock:
                self._children.discard(child)
            kill_group(child.pid)  # whatever the stage left behind
        if timed_out.is_set():
            raise Transient("took too long and was ended", where=stage, expected=f"at most {timeout_s:.0f} s")
        if code:
            code = stage_exit_code(list(lines), code)
            if code in _KILLED and kills_for_memory() > kills:
                raise self._killed_for_memory(stage)
            raise stage_error(stage, code, list(lines))
        said = "\n".join(lines)
        return "unchanged" if _UNCHANGED in said else "restored" if _RESTORED in said else "completed"


_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
"""How a killed stage ends, as DVC and as the shell between them tell it."""

_HINT = re.compile(
    r"To track the changes with git|\s*git add |To enable auto staging|\s*dvc config core.autostage|Use `dvc push`"
    r"|Updating lock file"
)
"""What DVC says to people at every stage."""
_EXITED = re.compile(r"exited with (-?\d+)")
_MAY_PASS = re.compile(r"is busy|Unable to acquire lock|LockError|rwlock|No space left on device")
_UNCHANGED, _RESTORED = "didn't change, skipping", "is cached - skipping run"


def stage_exit_code(lines: list[str], dvc_code: int) -> int:
    """Return the stage's exit code, which DVC (255 for any) prints in its output; 75 when DVC was held up itself."""
    for line in reversed(lines):
        if match := _EXITED.search(line):
            return int(match[1])
    return Transient.exit_code if any(_MAY_PASS.search(line) for line in lines) else dvc_code


def stage_error(stage: str, code: int, lines: list[str]) -> TemperError:
    """Build the error that a stage's exit code stands for, with the stage's message."""
    start = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith("error: ")), None)
    said = [line for line in lines[start:] if not line.startswith("ERROR: ")] if start is not None else lines
    kinds = {kind.exit_code: kind for kind in (BadInput, OutOfMemory, Transient)}
    kind = kinds.get(code, TemperError)
    text = "\n".join(said).removeprefix("error: ")
    return kind(f"stage {stage} failed (exit code {code})\n{text}")


def child_environment() -> dict[str, str]:
    """Build a stage's environment: this Python first on the path, and this process as the one it must not outlive."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "SHELL": "/bin/sh",
        OWNER: str(os.getpid()),
    }


def _stage_processes(child: Process) -> list[psutil.Process]:
    """Find the stage that a `dvc repro` runs: the process below it that is `python -m tasks....`."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(child.pid).children(recursive=True)
        return [p for p in below if any(word.startswith("tasks.") for word in words_of(p)[1:3])]
    return []


def changed_stages(workspace: Path) -> frozenset[str]:
    """Return the stages that DVC finds changed, or that have never run.

    Raises:
        TemperError: `dvc status` fails.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"]
    done = subprocess.run(command, cwd=workspace, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise TemperError(
            "DVC cannot tell what is up to date", where=str(workspace), got=(done.stderr or done.stdout).strip()
        )
    return frozenset(json.loads(done.stdout.strip().splitlines()[-1]))


_current: ContextVar[PipelineRun] = ContextVar("session")
_open: list[PipelineRun] = []


def current_session() -> PipelineRun:
    """Return the session that the running flow opened."""
    return _current.get()


@contextmanager
def opened(
    workspace: Path, params: Params, watch: Callable[[Event], None], advise: Callable[[str], str]
) -> Iterator[PipelineRun]:
    """Begin a session and make it the current one."""
    keys, changed = pipeline.recorded_keys(workspace), changed_stages(workspace)
    session = PipelineRun(workspace, params, pipeline.load(workspace), keys, changed, watch, advise)
    token = _current.set(session)
    _open.append(session)
    try:
        yield session
    except BaseException:
        session.stop()  # as when Prefect cancels the flow: no stage runs on when the workspace is free again
        raise
    finally:
        session.close()
        _open.remove(session)
        _current.reset(token)


def stop_all() -> None:
    """Stop every open session of this process."""
    for session in tuple(_open):
        session.stop()
        session.close()
