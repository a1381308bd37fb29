"""What many tests share: a pico model, workspaces made from this clone, and the real data that lies beside it.

Heavy things are made once per session. Nothing here needs a network, a GPU or anything outside the clone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil
import pytest
from filelock import FileLock

from tasks.core.stage import quiet_libraries
from tests.helpers.commands import environment, run_module

quiet_libraries()
os.environ.setdefault("TEMPER_COMPUTE_DTYPE", "float32")  # as on a machine without fast bf16, whatever this one has

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
DEAD = 2**22 + 1
"""A process id above the most that Linux gives out."""

FIRST_RUN = Path(".temper", "first-run.txt")
REAL_DATA = Path(os.environ.get("TEMPER_REAL_DATA", ROOT.parent / "shared" / "data"))


LONG = (
    "rehearsed_training",
    "rehearsed_dtypes",
    "readme",
    "recipes",
    "interruptions",
    "ending",
    "memory_tracker",
    "retrain",
    "schedule",
    "feedback_runs",
    "promote",
    "launcher",
    "estimate",
)
"""Files that take minutes: they begin first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, as far as they are in this list; all others stay in their order."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _threads_that_flush_nothing() -> None:
    """torch's threads keep the mode of the one that starts them, so they start before a training sets it."""
    if torch := sys.modules.get("torch"):
        torch.ones(torch.get_num_threads() << 16).exp()


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    """What a test or what it calls sets for the whole process ends with it, so that their order does not matter."""
    variables, folder = dict(os.environ), Path.cwd()
    forget_numeric_settings()  # those of a fixture that several tests share
    yield
    forget_numeric_settings()
    os.chdir(folder)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ |= variables


def forget_numeric_settings() -> None:
    """Give torch the settings and the seed of a new process, where it is in use at all."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real public files, where they lie beside the clone; tests that need them are skipped elsewhere."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}; set TEMPER_REAL_DATA")
    return REAL_DATA


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of some ten thousand random parameters with its own tokenizer, as a model folder."""
    import torch

    from tasks.base.pretraining import document, new_model, train_tokenizer
    from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon
    from tests.helpers.samples import pretrain_params

    lexicon = read_lexicon(ROOT / "data" / "lexicon.yaml")
    texts = [document(r) for rows in ("text", "talk") for r in generate_rows(Recipe("s", rows, 300, 1), lexicon)]  # type: ignore[arg-type]
    params = pretrain_params(context_tokens=128)  # room for a whole chat of the quickstart
    tokenizer = train_tokenizer(texts, params.vocabulary)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pico") / "base"
    new_model(params, tokenizer).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(pico_base: Path) -> PreTrainedTokenizerBase:
    """The pico model's tokenizer."""
    from tasks.tokenization.chat_template import load_tokenizer

    return load_tokenizer(pico_base)


@pytest.fixture
def random() -> Random:
    """A seeded generator."""
    return Random(7)


def copy_clone(target: Path) -> Path:
    """A fresh clone of this project as it stands, in git, with DVC's folder and nothing that was run."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("models/", "dvc.lock")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "clone")
    return target


def git(folder: Path, *words: str) -> str:
    """Runs git in a folder."""
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def temper(
    workspace: Path, *words: str, code: int = 0, timeout: int = 600, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does; fails the test when the exit code is another."""
    if extra:  # libraries look at the environment once, as they are imported
        done = _started_anew(workspace, ["flows.cli", *words], extra, timeout)
    else:
        done = run_module(workspace, "flows.cli", *words, timeout_s=timeout)
    return _ended_with(code, done)


def _started_anew(
    workspace: Path, words: list[str], variables: dict[str, str], timeout: int | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=workspace,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _ended_with(code: int, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, (
        f"exit {done.returncode}, expected {code}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    )
    return done


MARK = "TEMPER_TEST_MARK"
"""Environment variable by which what a process starts is found."""


HEARS_HANGUP = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(1, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
)
"""Begins a command with SIGHUP as it is at first, where these tests run under `nohup`, which no shell can undo."""


class Beside:
    """`temper` as a process beside this one, for as long as the block lasts.

    As in a script's background jobs, it begins with SIGINT ignored; and not with SIGHUP, though tests may.
    """

    def __init__(self, workspace: Path, *words: str) -> None:
        self._file = (workspace.parent / "said.txt").open("w+")
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *HEARS_HANGUP, sys.executable, "-m", "flows.cli", *words],
            cwd=workspace,
            env=environment(**{MARK: self._mark}),
            stdout=self._file,
            stderr=self._file,
            text=True,
            process_group=0,
        )

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        finally:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """Everything it has printed so far."""
        return Path(self._file.name).read_text()

    def left(self) -> list[str]:
        """The command lines of processes that it started, and they in turn, and that are alive."""
        return [line for line in map(self._line, psutil.process_iter()) if line]

    def _line(self, process: psutil.Process) -> str:
        with suppress(psutil.Error):
            if process.pid != self.process.pid and process.environ().get(MARK) == self._mark:
                return " ".join(process.cmdline())
        return ""


def wait_for(what: str, found: Callable[[], object], beside: Beside, timeout_s: float = 120) -> None:
    """Waits until something is so; fails the test with what the process said when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"no {what} after {timeout_s:.0f} s\n{beside.said()}"
        time.sleep(0.02)


def dvc(workspace: Path, *words: str, code: int = 0, **extra: str) -> str:
    """Runs DVC as a user does; returns everything it printed."""
    done = _ended_with(code, _started_anew(workspace, ["dvc", *words], extra))
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone to copy workspaces from; its path has a space in it."""
    return copy_clone(tmp_path_factory.mktemp("a clone") / "temper")


@pytest.fixture
def workspace(clone: Path, pico_base: Path, tmp_path: Path) -> Path:
    """A workspace of its own in which nothing has run, on the pico model and a few rows."""
    return pico_workspace(clone, pico_base, tmp_path / "work space")


def pico_workspace(clone: Path, pico_base: Path, target: Path) -> Path:
    """Copies the clone and makes everything in its params small."""
    from tests.helpers.samples import PICO_SETTINGS

    shutil.copytree(clone, target, symlinks=True)
    shutil.copytree(pico_base, target / "models" / "tiny")
    from flows.run.edit_params import change_params

    change_params(target, target / "recipes" / "quickstart.yaml", PICO_SETTINGS)
    return target


@pytest.fixture(scope="session")
def factory(clone: Path, pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which `temper run` has run through once, with all three methods; tests only look at it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a folder of its own in that of the whole session
        shared = shared.parent
    target = shared / "factory" / "work space"
    with FileLock(shared / "factory.lock"):
        if not (target / FIRST_RUN).is_file():
            _first_run(pico_workspace(clone, pico_base, target))
    return target


def _first_run(target: Path) -> None:
    listener, heard = ROOT / "tests" / "connections", target.parent / "connections.txt"
    done = temper(target, "run", PYTHONPATH=str(listener), TEMPER_TEST_CONNECTIONS=str(heard))
    (target / FIRST_RUN).write_text(done.stdout + done.stderr)


def run_stages(workspace: Path, recipe: str, *settings: str) -> str:
    """Runs the commands of all stages of a recipe in one process, so that libraries are imported once.

    What Prefect and DVC do around them is the matter of other tests. Returns what was printed.
    """
    from flows.run.edit_params import change_params

    change_params(workspace, workspace / "recipes" / recipe, list(settings))
    return run_all_stages(workspace)


def run_all_stages(workspace: Path) -> str:
    """Runs the commands of all stages, as params.yaml stands, in one process. Returns what was printed."""
    done = run_module(workspace, "tests.helpers.all_stages")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def digests(workspace: Path, *folders: str) -> dict[str, str]:
    """The SHA-256 of every file below some folders."""
    return {
        str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted((workspace / folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def copy(factory: Path, tmp_path: Path) -> Path:
    """A copy of the finished workspace to change, with artifacts of its own."""
    target = tmp_path / "a copy"
    shutil.copytree(factory, target, symlinks=True)
    return target


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what comes with a model take a fifth of a second a row, and 64 MiB."""
    from tasks.core.limited_process import WORKER, Limits

    WORKER.close()
    monkeypatch.setattr(WORKER, "_lost", type(WORKER._lost)())
    monkeypatch.setattr(WORKER, "limits", Limits(row_s=0.2, lost_s=30.0, memory_bytes=64 << 20))
    yield
    WORKER.close()
