"""Process of a stage: what every stage does around its work.

- Exit codes: 0 done, 65 bad input, 71 too little memory, 75 transient, anything else a fault; an error is one
  readable block.
- It dies with the `dvc` or the flow that started it, so that no orphan goes on writing.
- It knows the content key of what it reads, and fails when an input is edited while it runs.
- Of several processes that were launched together, the first reports for all of them.
- The libraries below neither report usage nor look anything up on a network.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tasks.core import pipeline
from tasks.core.errors import BadInput, BadParams, InputsChanged, TemperError, Transient
from tasks.core.memory import out_of_memory, ran_out
from tasks.core.ranks import launched

if TYPE_CHECKING:
    import psutil

OWNER = "TEMPER_OWNER"
"""Environment variable: process id of the flow that started this stage."""

QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # stages run side by side: threads that spin while they wait slow the others down, those that sleep at once are slow
    # to wake; so they spin for some tens of microseconds (bench/LOG.md)
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "TOKENIZERS_PARALLELISM": "true",
    "TQDM_DISABLE": "1",  # the bars of libraries; ours ask to be shown
    "TRANSFORMERS_VERBOSITY": "error",
}
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
_WATCH_S = 0.5
_FIRST_TELLS_S = 10.0
"""So long the other processes let the first one tell of an error, whose end is theirs; then each tells its own."""
TOLD = "TEMPER_TOLD"
"""Environment variable: a folder in which processes that were launched together mark what one of them has told."""


@dataclass(frozen=True)
class StageContext:
    """A running stage: its arguments, the params file and the identity of what it reads."""

    workspace: Path
    arguments: argparse.Namespace
    key: str

    def section(self, key: str, kind: Any) -> Any:
        """Read what stands at a dotted key of params.yaml, checked and typed; other sections are not looked at.

        Args:
            key: one of those that dvc.yaml lists for the stage.
            kind: its type: a `Section`, or anything that pydantic knows.

        Raises:
            BadParams: the file is missing or not YAML, or keys in there are wrong.
        """
        from tasks.core.params_file import read_yaml, validated  # not on top: every command would wait for it

        file = self.workspace / pipeline.PARAMS
        return validated(kind, read_yaml(file), str(file), tuple(key.split(".")))

    def path(self, name: str) -> Path:
        """Return a folder or file given on the command line."""
        return Path(getattr(self.arguments, name))

    @property
    def item(self) -> str:
        """Return the source or method that the stage works on."""
        return str(self.arguments.item)


@contextmanager
def run_stage(
    description: str | None, *paths: str, item: str | None = None, may_fetch: bool = False
) -> Iterator[StageContext]:
    """Run a stage's work, given as the body of the `with` statement, as a process.

    Args:
        description: the module's docstring, shown by --help.
        paths: names of the folders and files on the command line, as `--name`.
        item: the name of the positional argument, for stages that run once per source or method.
        may_fetch: whether the stage may ask the hub for something that params pin.
    """
    quiet_libraries(offline=not may_fetch)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if item:
        parser.add_argument("item", metavar=item.upper())
    for name in paths:
        parser.add_argument(f"--{name}", required=True, metavar="PATH")
    arguments = parser.parse_args()
    die_with_owner()
    with readable_errors():
        workspace = pipeline.find_workspace(Path.cwd())
        nodes = pipeline.load(workspace)
        node = nodes.get(os.environ.get("DVC_STAGE", ""))
        if node is None:  # by hand, without DVC
            yield StageContext(workspace, arguments, key=_key_by_hand(workspace, nodes, vars(arguments)))
            return
        before = _fingerprint(workspace, node)
        yield StageContext(workspace, arguments, key=pipeline.content_key(workspace, node))
        if _fingerprint(workspace, pipeline.load(workspace).get(node.name, node)) != before:
            raise InputsChanged(
                "an input was edited while the stage ran; its result is not recorded",
                where=node.name,
                fix="run it again",
            )


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with an error's own exit code after printing it as one block; faults keep their traceback."""
    try:
        yield
    except TemperError as error:
        _end(str(error), error.exit_code)
    except Exception as error:
        if ran_out(error):
            short = out_of_memory(error, where="", fix="work on fewer rows at once, or take a machine with more memory")
            _end(str(short), short.exit_code)
        told = tell_of_storage(error)
        if told is None:
            raise
        _end(*told)


def _end(said: str, exit_code: int) -> NoReturn:
    if launched().rank:
        time.sleep(_FIRST_TELLS_S)
    if _is_new(said):
        print(f"error: {said}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def _is_new(said: str) -> bool:
    """Return whether no process that was launched together with this one has told the same."""
    folder = os.environ.get(TOLD)
    if not folder:
        return True
    try:
        (Path(folder) / sha256(said.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has ended, or the disk is full: told twice is better than not at all
        return True
    return True


def tell_of_storage(error: Exception) -> tuple[str, int] | None:
    """Describe a full or read-only disk, with the exit code; return None for any other error.

    A full disk may be freed, so that is transient. Some libraries (safetensors) report it in words alone.
    """
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return (
            f"the disk is full\n  got:      {error}\n  to fix:   free some space, then run it again",
            Transient.exit_code,
        )
    if isinstance(error, OSError) and number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename or 'writing'}: {error.strerror}\n  to fix:   make it writable", BadInput.exit_code
    return None


def quiet_libraries(*, offline: bool = True) -> None:
    """Set the switches of QUIET and OFFLINE that the user has not set; call it before any other heavy import."""
    for name, value in (QUIET | OFFLINE if offline else QUIET).items():
        os.environ.setdefault(name, value)
    hub = sys.modules.get("huggingface_hub.constants")  # it looks once, and is there already in the fork of a run
    if hub and (switch := os.environ.get("HF_HUB_OFFLINE")):
        vars(hub)["HF_HUB_OFFLINE"] = switch.upper() in ("1", "ON", "YES", "TRUE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a package that would fetch kernels
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # in PEFT


def words_of(process: psutil.Process) -> list[str]:
    """Return the words of a process's command line, also of one that has named itself as a run's forks do."""
    words = [word for word in process.cmdline() if word]
    return words[0].split() if len(words) == 1 else words  # a name is one text, which begins with `python -m`


def die_with_owner() -> None:
    """End this process as soon as one that it works for is gone.

    DVC leaves its command running when it is killed, and may stand behind a shell: so it is found among the ancestors
    and watched, besides the direct parent and the flow named in the environment.
    """
    import psutil

    watched = [psutil.Process(os.getppid())]
    watched += [p for p in psutil.Process().parents()[:3] if any(Path(word).name == "dvc" for word in words_of(p)[:3])]
    if owner := os.environ.get(OWNER):
        if not psutil.pid_exists(int(owner)):
            os._exit(Transient.exit_code)
        watched.append(psutil.Process(int(owner)))

    def watch() -> None:
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in watched):
            time.sleep(_WATCH_S)
        os._exit(Transient.exit_code)

    threading.Thread(target=watch, name="die-with-owner", daemon=True).start()


def _key_by_hand(workspace: Path, nodes: Mapping[str, pipeline.Node], arguments: Mapping[str, str]) -> str:
    """Compute the identity of a stage's inputs without DVC.

    The very command of a stage of dvc.yaml has that stage's key. Any other has one of its arguments, the values in
    params.yaml and the data that it names.
    """
    words = [module_of_main(), *sys.argv[1:]]
    for node in nodes.values():
        if shlex.split(node.command)[2:] == words:
            return pipeline.content_key(workspace, node)
    data = [path for name, path in arguments.items() if name not in ("item", "out") and Path(path).exists()]
    command = f"{words[0]} {sorted(arguments.items())}"
    hashes = {path: pipeline.dvc_hash(workspace / path) for path in data}
    rooms = [f"tasks/{room.name}" for room in sorted((workspace / "tasks").iterdir())]
    return pipeline.key_of(
        command, hashes, pipeline.read_values(workspace), pipeline.declared_defaults(workspace, rooms)
    )


def module_of_main() -> str:
    """Return what `python -m` was given: of a package that is run, its own name."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else ""


def _fingerprint(workspace: Path, node: pipeline.Node) -> object:
    """Compute a value that changes with any write to a dependency or param; it stats every file and hashes none."""
    files = []
    for dep in node.deps:
        path = workspace / dep
        if not path.exists():
            raise BadParams("does not exist", where=str(path), fix="correct the path in params.yaml")
        below = (file for file in path.rglob("*") if not pipeline.is_written_by_python(file.relative_to(path)))
        for file in sorted(below) if path.is_dir() else [path]:
            stat = file.stat()
            files.append(
                (
                    str(file),
                    stat.st_size if file.is_file() else 0,
                    stat.st_mtime_ns if file.is_file() else 0,
                    stat.st_ino,
                )
            )
    return node.command, dict(node.params), files
