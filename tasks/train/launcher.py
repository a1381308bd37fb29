"""A stage that starts itself again as several processes, by accelerate's launcher and one of its configurations.

TEMPER_LAUNCH names the configuration (infra/launch/): how many processes a machine has room for is a fact of the
machine, and what comes of the training is the same within rounding, so it is no param. Signals that ask it to stop are
passed on, so that all processes end after their present step, and the exit code is that of the one that knows best why.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.core.errors import BadInput, BadParams, OutOfMemory, Transient
from tasks.core.ranks import ALONE, launched
from tasks.core.signals import on_stop
from tasks.core.stage import TOLD, die_with_owner, quiet_libraries, readable_errors

LAUNCH = "TEMPER_LAUNCH"
"""Environment variable: a configuration of `accelerate launch`."""

_DRAGGED_DOWN = (Transient.exit_code, -signal.SIGTERM)
"""How a process ends that lost another, or was ended by the launcher since another had failed."""

_SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a process."""


def launch_if_asked(module: str) -> None:
    """End this process with the exit code of several that run the same command, where TEMPER_LAUNCH asks for them."""
    config = os.environ.pop(LAUNCH, "")  # those that are launched are not to launch others
    if not config or launched() != ALONE:
        return
    quiet_libraries()
    die_with_owner()
    with readable_errors():
        sys.exit(launch(Path(config), module, sys.argv[1:]))


def launch(config: Path, module: str, words: list[str]) -> int:
    """Run a module with some arguments in the processes of a configuration; return their common exit code.

    Raises:
        BadParams: accelerate does not take the configuration.
    """
    if not config.is_file():
        raise BadParams("does not exist", where=str(config), fix=f"correct the path in {LAUNCH}, or unset it")
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's own handler loses the exit codes
    # what it logs of processes that fail they have told themselves
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args(["--config_file", str(config), "--module", module, *words])
    try:
        with TemporaryDirectory(prefix="temper-told-") as told, _passing_signals_on():
            os.environ[TOLD] = told
            launch_command(asked)
    except ChildFailedError as error:
        code = code_of(failure.exitcode for failure in error.failures.values())
        if code > _SIGNALLED:
            print(f"error: one of the processes was ended by signal {code - _SIGNALLED}", file=sys.stderr, flush=True)
        return code
    except (ValueError, TypeError, ImportError, ConnectionError) as error:
        raise BadParams(
            "accelerate does not launch by this configuration", where=str(config), got=str(error).split("\n")[0]
        ) from error
    return 0


def code_of(codes: Iterable[int]) -> int:
    """Return the exit code of processes that failed together: of the one with the cause, not of those it dragged down.

    A process that was ended by a signal has minus its number for a code; what is returned is as in a shell.
    """
    own = (BadInput.exit_code, OutOfMemory.exit_code)
    found = list(codes)
    ranked = [c for c in own if c in found] + [c for c in found if c not in _DRAGGED_DOWN]
    ranked += [c for c in _DRAGGED_DOWN if c in found]
    return ranked[0] if ranked[0] >= 0 else _SIGNALLED - ranked[0]


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Pass signals that ask to stop on to the child processes within this block; they end this one through them."""
    import psutil

    def pass_on(number: int, frame: object) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    with on_stop(pass_on):
        yield
