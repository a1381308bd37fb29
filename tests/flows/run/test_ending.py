"""A command that a signal ends: nothing that it started is left, it says one line, and the next one can begin."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from flows.run import prefect_server
from flows.run.edit_params import change_params
from flows.run.lock import held
from flows.run.schedule import name_of
from tests.conftest import HEARS_HANGUP, Beside, temper, wait_for
from tests.flows.run.test_schedule import deployments, noted
from tests.helpers.commands import environment

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
LOG = Path(".temper", prefect_server.LOG)
GOES_ON = "`temper run` goes on from here"


def ends(beside: Beside, sent: signal.Signals, what_next: str, code: int) -> None:
    """It ends by a signal, with all that it started and one line; by SIGKILL, with all that it started."""
    before = len(beside.said())
    beside.process.send_signal(sent)
    if sent is KILL:
        assert beside.process.wait(timeout=10) == -KILL
        wait_for("end of what it started", lambda: not beside.left(), beside, 20)
        return
    assert beside.process.wait(timeout=60) == code, beside.said()
    assert beside.left() == []
    said = beside.said()[before:].splitlines()
    assert said[-1] == f"stopped by {sent.name}" + (f"; {what_next}" if what_next else "")
    # whatever else it says was on its way
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d+ \| ", line) for line in said[:-1]), said
    assert "Traceback" not in beside.said()


def flow_runs(workspace: Path) -> list[tuple[str, str]]:
    """The state and its message of every flow run that did not complete."""
    query = (
        "select state_type, message from flow_run join flow_run_state on flow_run_state.id = state_id"
        " where state_type not in ('COMPLETED', 'SCHEDULED')"
    )
    with sqlite3.connect(workspace / ".temper" / "prefect" / "prefect.db") as database:
        return database.execute(query).fetchall()


@pytest.fixture(scope="module")
def finished(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished workspace for this file: whatever its tests stop, the next one goes on with it."""
    target = tmp_path_factory.mktemp("ending") / "work space"
    shutil.copytree(factory, target, symlinks=True)
    return target


@pytest.fixture(scope="module")
def training(finished: Path) -> Path:
    """Another, in which a training is to run that takes some seconds."""
    target = finished.parent / "training" / "work space"
    shutil.copytree(finished, target, symlinks=True)
    change_params(target, None, ["train.qlora.epochs=10"])
    return target


# --- temper run -------------------------------------------------------------------------------------------------------

Reached = Callable[[Path, str], object]
STATES: dict[str, Reached] = {
    "start": lambda workspace, said: (workspace / LOG).is_file(),
    "between stages": lambda workspace, said: "Finished in state Unchanged" in said,
    "promoting": lambda workspace, said: "for flow 'promote'" in said,
}


# every state and every signal: which one it is makes no difference to the nest that it ends, as is tested below
@pytest.mark.parametrize(
    ("state", "sent"),
    [("start", INT), ("start", KILL), ("between stages", INT), ("between stages", HUP), ("promoting", TERM)],
)
def test_a_run_ends_by_any_signal(finished: Path, state: str, sent: signal.Signals) -> None:
    for earlier in (LOG, ".temper/last-run.json"):  # by the second, a run would find nothing to do at once
        (finished / earlier).unlink(missing_ok=True)
    with Beside(finished, "run") as run:
        wait_for(state, lambda: STATES[state](finished, run.said()), run)
        ends(run, sent, GOES_ON, 75)
    with held(finished, "the test"):
        pass
    if state != "start":  # no stage goes on, and a promotion may have been through
        assert all("stopped" in message for _, message in flow_runs(finished))
        assert flow_runs(finished) or state == "promoting"


@pytest.mark.parametrize("sent", [INT, TERM])
def test_a_run_ends_in_a_stage_which_goes_on_in_the_next(training: Path, sent: signal.Signals) -> None:
    with Beside(training, "run") as run:
        wait_for("training", lambda: re.search(r"\d+/\d+ steps", run.said()), run)
        ends(run, sent, GOES_ON, 75)
    steps = [int(folder.name.removeprefix("step-")) for folder in (training / ".temper/checkpoints").glob("*/step-*")]
    assert steps
    with sqlite3.connect(training / ".temper" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs where status = 'RUNNING'").fetchone() == (0,)


# --- other commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [TERM, KILL])
def test_a_promotion_ends_while_it_waits_for_a_persons_word(copy: Path, sent: signal.Signals) -> None:
    change_params(copy, None, ["promote.approval=human"])
    with sqlite3.connect(copy / ".temper" / "mlflow.db") as database:  # as if nothing had been promoted
        database.execute("delete from registered_model_aliases")
        database.execute("update experiments set name = 'forgotten' where name like '% ledger'")
    with Beside(copy, "promote") as promotion:
        wait_for("question", lambda: "waiting for approval" in promotion.said(), promotion)
        ends(promotion, sent, "", 75)
    with held(copy, "the test"):
        pass
    if sent is not KILL:
        assert flow_runs(copy) == [("CRASHED", f"stopped by {sent.name}")]


def serving(workspace: Path) -> Beside:
    (workspace / ".temper" / "prefect-server.json").unlink(missing_ok=True)
    return Beside(workspace, "schedule", "--cron", "0 3 * * *")


def deployment_of(workspace: Path) -> list[str]:
    """The id of a workspace's deployment; a copy knows those of the original as well."""
    return [each["id"] for each in deployments(workspace) if each["name"] == name_of(workspace)]


RESTS = "the schedule rests until it is served again"


@pytest.mark.parametrize("sent", [TERM, KILL])
def test_a_schedule_ends_while_it_waits(finished: Path, sent: signal.Signals) -> None:
    with serving(finished) as schedule:
        wait_for("deployment", lambda: deployment_of(finished), schedule)
        ends(schedule, sent, RESTS, 0)
    with held(finished, "the test", "schedule.lock"):
        pass


@pytest.mark.parametrize("sent", [INT, KILL])
def test_a_schedule_ends_with_the_run_that_it_started(training: Path, sent: signal.Signals) -> None:
    with serving(training) as schedule:
        wait_for("deployment", lambda: deployment_of(training), schedule)
        (found,) = deployment_of(training)
        httpx.post(f"{noted(training)['api']}/deployments/{found}/create_flow_run", json={})
        wait_for("training", lambda: re.search(r"\d+/\d+ steps", schedule.said()), schedule)
        ends(schedule, sent, RESTS, 0)
    with held(training, "the test"), held(training, "the test", "schedule.lock"):
        pass
    if sent is not KILL:
        assert "RUNNING" not in [state for state, _ in flow_runs(training)]


def test_what_was_stopped_is_no_hindrance(finished: Path) -> None:
    assert "nothing has changed since the last run" in temper(finished, "run").stdout


# --- the mechanism ----------------------------------------------------------------------------------------------------


def script(text: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs some lines after the imports that they need; `before` is for the shell that starts them."""
    lines = f"import os, signal, time\nfrom flows.run.ending import aside, stoppable\n{text}"
    start = ["sh", "-c", f'{before}; exec "$@"' if before else 'exec "$@"', "sh", sys.executable, "-c", lines]
    command = [*HEARS_HANGUP, shutil.which("sh") or "sh", *start[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())


ASIDE = """
def work():
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)

with stoppable():
    try:
        aside(work, stop=lambda stopped: print("stages", flush=True))
    finally:
        print("server", flush=True)
"""


@pytest.mark.parametrize("sent", [INT, TERM, HUP])
def test_the_work_is_ended_before_what_is_around_it(sent: signal.Signals) -> None:
    done = script(ASIDE.format(name=sent.name))
    assert (done.returncode, done.stdout, done.stderr) == (75, "stages\nserver\n", f"stopped by {sent.name}\n")


def test_a_signal_that_was_ignored_at_the_start_ends_it_but_not_a_closed_terminal_under_nohup() -> None:
    assert script(ASIDE.format(name="SIGINT"), 'trap "" INT').returncode == 75
    survived = script("with stoppable():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('on')", 'trap "" HUP')
    assert (survived.returncode, survived.stdout, survived.stderr) == (0, "on\n", "")


def test_what_the_work_returns_or_raises_is_what_comes_out() -> None:
    raising = "def work(): raise ValueError('mine')\nwith stoppable(): aside(work, stop=print)"
    assert "ValueError: mine" in script(raising).stderr
    assert script("with stoppable(): print(aside(lambda: 7, stop=print))").stdout == "7\n"


def test_a_second_signal_does_not_break_off_the_ending() -> None:
    again = (
        "lambda stopped: (os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGTERM), print('whole'))"
    )
    done = script(ASIDE.format(name="SIGTERM").replace('lambda stopped: print("stages", flush=True)', again))
    assert (done.returncode, done.stdout, done.stderr) == (75, "whole\nserver\n", "stopped by SIGTERM\n")


WAITS = {"lock": "aside(lambda: time.sleep(60), stop=print)", "child": "subprocess.run(['sleep', '60'])"}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("sent", [INT, TERM, HUP])
def test_a_signal_that_another_thread_takes_ends_what_the_main_thread_waits_in(wait: str, sent: signal.Signals) -> None:
    """As the kernel may give it to any; then no wait of the main thread is interrupted."""
    other = f"""
import subprocess, threading
def take():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.{sent.name})
    time.sleep(60)

threading.Thread(target=take, daemon=True).start()
with stoppable(): {WAITS[wait]}
"""
    done = script(other)
    assert (done.returncode, done.stderr) == (75, f"stopped by {sent.name}\n")


def test_a_signal_whose_exception_python_drops_ends_it_all_the_same() -> None:
    """As an exception in `__del__` is."""
    dropping = """
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass

with stoppable():
    Dropping()
    aside(lambda: print("never"), stop=print)
"""
    done = script(dropping)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.endswith("stopped by SIGTERM\n")
