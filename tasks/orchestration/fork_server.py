"""Fork server of a run: a process that has imported the heavy libraries, from which DVC and the stages are forked.

A stage imports torch, transformers and PEFT for five to ten CPU seconds, and a run has a dozen of them. The server
imports them once and does nothing else: it touches no device, starts no computation and imports no code of temper but
this file, so that a stage always runs the code that DVC sees.

Every request forks twice, from the process as it is after its imports. The first fork becomes `dvc repro`; the second
waits below it and becomes the stage if DVC finds that its command must run. So a stage is DVC's child and in its group,
as it is without this server: signals, kills, exit codes, output, memory and environment are its own.

Linux only. Where there is no server, or it is gone, stages are started as plain processes.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import re
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

LIBRARIES = (
    "dvc.cli.parser",
    "dvc.repo.reproduce",
    "dvc.utils.strictyaml",
    "scmrepo.git",
    "ruamel.yaml",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "alembic.autogenerate",
)
"""What stages import, in the order in which a run comes to need it."""

_MESSAGE_BYTES = 1 << 20
_SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a process."""
_PLAIN = re.compile(r"python -m tasks\.[\w\s./=@:,+%'\"-]+")
"""A command that means the same to a shell and to `shlex`."""


class Command(NamedTuple):
    """What a fork is to do.

    Attributes:
        words: `python`, `-m`, a module, and its arguments.
        folder: where.
        environment: all of its variables.
    """

    words: Sequence[str]
    folder: str
    environment: Mapping[str, str]


class ForkServer:
    """A fork server, as the process that started it sees it."""

    def __init__(
        self, workspace: Path, environment: Mapping[str, str], log: Path, libraries: Sequence[str] = LIBRARIES
    ) -> None:
        """Start the server; it takes requests at once, whatever it has imported by then.

        Args:
            workspace: the folder with this project's code.
            environment: with it the libraries are imported.
            log: a file for what they say meanwhile.
            libraries: modules to import.

        Raises:
            OSError: the log cannot be written.
        """
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks.orchestration.fork_server", str(theirs.fileno()), *libraries],
                cwd=workspace,
                # asked in this way, CUDA can still be used by the forks of a process that has asked
                env={**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, command: Command) -> ForkedProcess:
        """Fork a process that runs a command in a session of its own, whose output is read from its `stdout`.

        Raises:
            OSError: the server is gone.
        """
        output, theirs = os.pipe()
        try:
            return self.fork(command, theirs, theirs, os.fdopen(output, errors="replace"))
        finally:
            os.close(theirs)

    def fork(self, command: Command, stdout: int, stderr: int, output: TextIO | None = None) -> ForkedProcess:
        """Fork a process that runs a command in a session of its own.

        Args:
            command: of DVC; or of another module, which then finds no process for a stage below it.
            stdout: the file descriptor that it writes to.
            stderr: the one for its errors.
            output: where this process reads what it writes, closed if it cannot be started.

        Raises:
            OSError: the server is gone.
        """
        end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with its_end:
                socket.send_fds(self._requests, [json.dumps(command).encode()], [stdout, stderr, its_end.fileno()])
            if not (pid := end.recv(_MESSAGE_BYTES)):
                raise ConnectionResetError("the fork server is gone")
        except OSError:
            end.close()
            if output:
                output.close()
            raise
        return ForkedProcess(int(pid), end, output)

    def close(self) -> None:
        """End the server, in the middle of an import if need be. What was forked from it goes on."""
        self._requests.close()
        self._process.terminate()
        self._process.wait()


class ForkedProcess:
    """A process that a fork server made: the part of `subprocess.Popen` that a run uses.

    Attributes:
        pid: its process id, which is that of its session and its group too.
        stdout: what it and its children print.
    """

    def __init__(self, pid: int, end: socket.socket, stdout: TextIO | None) -> None:
        """Take the process's id, where its server tells of its end, and where its output is read."""
        self.pid = pid
        self.stdout = stdout
        self._end = end

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit code, minus the number of the signal that ended it.

        Args:
            timeout: seconds after which `subprocess.TimeoutExpired` is raised.
        """
        if not select.select([self._end], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        code = self._end.recv(_MESSAGE_BYTES, socket.MSG_PEEK)  # whoever else waits finds it as well
        return int(code) if code else -signal.SIGKILL  # without its server nobody knows, and nobody would come to know


def main() -> None:
    """Serve until whoever started this closes its end; each fork leaves the loop and becomes what was asked for."""
    if (command := _serve(socket.socket(fileno=int(sys.argv[1])), deque(sys.argv[2:]))) is None:
        return
    random.seed()  # or all forks would draw the same names
    os.setsid()
    if command.words[2] != "dvc":
        _end_as(partial(_be, command))
    order, orders = os.pipe()
    if stage := os.fork():
        os.close(order)
        _end_as(partial(_be_dvc, command, stage, orders))
    os.close(orders)
    with open(order) as file:
        said = file.read()
    if not said:  # DVC had nothing to run
        os._exit(0)
    _end_as(partial(_be, Command(*json.loads(said))))


def _end_as(work: Callable[[], object]) -> NoReturn:
    """Do some work as if this process were for it alone, and end with its exit code.

    As in the forks of `multiprocessing` the interpreter is not taken apart, nor are the libraries: what is shared with
    the server would be copied for that, and torch alone takes half a CPU second to forget its operators.
    """
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # what the work adds is not among them
        each.atexit = False
    code: object = 1
    try:
        work()
        code = None
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def _serve(requests: socket.socket, libraries: deque[str]) -> Command | None:
    """Import libraries and answer requests meanwhile; return the command in a request's fork, None at the end."""
    ended, ending = os.pipe()
    os.set_blocking(ending, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ending, warn_on_full_buffer=False)
    ends: dict[int, socket.socket] = {}
    while True:
        sources: list[socket.socket | int] = [requests, ended]
        ready, _, _ = select.select(sources, [], [], 0 if libraries else None)
        if ended in ready:
            os.read(ended, _MESSAGE_BYTES)
            _tell_ends(ends)
        if requests in ready:
            message, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 3)
            if not message:
                return None
            stdout, stderr, end = descriptors
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                for each in (requests, *ends.values()):
                    each.close()
                for descriptor in (stdout, stderr, end, ended, ending):
                    os.close(descriptor)
                return Command(*json.loads(message))
            os.close(stdout)
            os.close(stderr)
            ends[pid] = socket.socket(fileno=end)
            ends[pid].send(str(pid).encode())
        elif libraries:
            importlib.import_module(libraries.popleft())
            gc.freeze()  # what forks share is not to be copied by their collections


def _tell_ends(ends: dict[int, socket.socket]) -> None:
    """Send the exit codes of children that have ended to those who wait for them."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            with ends.pop(found[0]) as end, suppress(BrokenPipeError):
                end.send(str(os.waitstatus_to_exitcode(found[1])).encode())


def _be_dvc(command: Command, stage: int, orders: int) -> None:
    """Run DVC; what it would run of a stage goes to the process that waits for it."""
    import dvc.stage.run
    from dvc.stage.exceptions import StageCmdFailedError

    started_by_shell, waiting = dvc.stage.run._run, [stage]

    def run(executable: str, line: str, *, cwd: str, env: dict[str, str], **settings: object) -> None:
        if not waiting or not _PLAIN.fullmatch(line):
            started_by_shell(executable, line, cwd=cwd, env=env, **settings)
            return
        with open(orders, "w") as file:
            json.dump(Command(shlex.split(line), cwd, env), file)
        _, status = os.waitpid(waiting.pop(), 0)
        if code := os.waitstatus_to_exitcode(status):
            raise StageCmdFailedError(line, code if code > 0 else _SIGNALLED - code)

    dvc.stage.run._run = run
    _be(command)


def _be(command: Command) -> None:
    """Do in this process what `python -m MODULE ARGUMENTS` would do in a new one."""
    from setproctitle import setproctitle

    os.chdir(command.folder)
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():  # a library has used CUDA as it was imported: forks cannot
        os.execve(sys.executable, list(command.words), command.environment)  # noqa: S606  # by no shell, as is meant
    setproctitle(shlex.join(command.words))  # it finds its place by the environment: before that is changed
    os.environ.clear()
    os.environ.update(command.environment)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tasks"]:
        del sys.modules[name]  # as it stands in that folder, it is read anew
    sys.path[0] = command.folder
    sys.argv = list(command.words[2:])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
