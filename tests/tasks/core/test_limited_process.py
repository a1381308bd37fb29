from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.core.errors import BadModel, TemperError
from tasks.core.limited_process import DIED, MEMORY, REFUSED, SIZE, TIME, Failure, LimitedProcess, Limits, Result

DOING = "tests.helpers.rows_for_workers:doing"
SMALL = Limits(row_s=0.2, lost_s=1.0, memory_bytes=64 << 20)
PATIENT = SMALL._replace(lost_s=60.0)


@pytest.fixture
def worker() -> Iterator[LimitedProcess]:
    made = LimitedProcess(SMALL)
    yield made
    made.close()


def do(worker: LimitedProcess, *rows: tuple[str, Any]) -> list[Result | Failure]:
    return worker.map(DOING, "do", rows)


def kinds(found: list[Result | Failure]) -> list[str]:
    return [each.kind if isinstance(each, Failure) else each.text for each in found]


def test_rows_come_back_in_order_with_what_is_beside_them(worker: LimitedProcess) -> None:
    texts = ["", "plain", "汉字 ✓", "\ud800 alone", "line\nbreak\x00", "x" * 100_000]
    rows = [("text", text) for text in texts]
    assert do(worker, *rows, ("marks", "m")) == [*map(Result, texts), Result("m", [1, [2]])]
    assert worker.map(DOING, "echo", []) == []


def test_more_than_is_sent_at_once_comes_whole(worker: LimitedProcess) -> None:
    rows = [("text", str(number % 10) * 300_000) for number in range(60)]  # 18 MB
    assert [each.text[:2] for each in do(worker, *rows) if isinstance(each, Result)] == [r[1][:2] for r in rows]


def test_a_row_at_fault_gets_the_reason_and_the_others_their_texts(worker: LimitedProcess) -> None:
    worker.limits = PATIENT
    found = do(
        worker,
        ("text", "a"),
        ("hang", None),
        ("text", "b"),
        ("fill", 10**10),
        ("fill", 1 << 30),
        ("long", 8 << 20),
        ("raise", "why"),
        ("die", signal.SIGSEGV),
        ("text", "c"),
    )
    assert kinds(found) == ["a", TIME, "b", MEMORY, MEMORY, SIZE, REFUSED, DIED, "c"]
    assert found[1] == Failure(TIME, "more than 0.2 s")
    assert found[3] == Failure(MEMORY, "more than 64 MiB")
    assert found[6] == Failure(REFUSED, "why", "ValueError")
    assert found[7] == Failure(DIED, "ended its process (signal 11)")


def test_what_takes_no_processor_time_is_stopped_by_the_clock(worker: LimitedProcess) -> None:
    worker.limits = Limits(row_s=0.05)
    assert kinds(do(worker, ("sleep", 30.0), ("text", "a"))) == [TIME, "a"]


def test_what_all_rows_share_is_stopped_once(worker: LimitedProcess) -> None:
    assert kinds(worker.map(DOING, "open", ["a", "b", "c"])) == [TIME] * 3
    assert kinds(worker.map("tests.helpers.rows_for_workers:missing", "", ["a"])) == [REFUSED]
    assert kinds(do(worker, ("text", "a"))) == ["a"]


def test_too_much_time_lost_ends_the_file(worker: LimitedProcess) -> None:
    with pytest.raises(BadModel, match="takes more time or memory than it may") as caught:
        do(worker, *[("hang", None)] * 9)
    assert caught.value.exit_code == 65
    assert "5 times, about 1 s in all" in caught.value.got
    with pytest.raises(BadModel, match="takes more time or memory than it may"):  # as a file's next rows
        do(worker, ("text", "a"))


@pytest.mark.parametrize("row", [("fill", 10**10), ("long", 8 << 20), ("die", signal.SIGKILL)])
def test_so_does_too_much_memory(worker: LimitedProcess, row: tuple[str, Any]) -> None:
    with pytest.raises(BadModel, match="takes more time or memory than it may") as caught:
        do(worker, *[row] * 9)
    assert "4 times" in caught.value.got


def test_a_process_is_kept_warm_until_it_must_end(worker: LimitedProcess) -> None:
    first, second = do(worker, ("pid", 0)), do(worker, ("pid", 0))
    assert first == second
    do(worker, ("hang", None))
    third = do(worker, ("pid", 0))
    assert third != first
    assert isinstance(first[0], Result)
    with pytest.raises(ProcessLookupError):  # it was waited for, too
        os.kill(int(first[0].text), 0)


def test_it_neither_prints_nor_writes_nor_heeds_the_group(
    worker: LimitedProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = do(worker, ("print", "hello"), ("write", str(tmp_path / "file")), ("pid", 0))
    assert isinstance(found[2], Result)
    assert os.getsid(int(found[2].text)) == int(found[2].text)
    assert kinds(found)[1] == REFUSED
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").stat().st_size


def test_this_process_stays_small(worker: LimitedProcess) -> None:
    worker.limits = PATIENT
    do(worker, ("text", "warm"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    do(worker, *[("long", 30 << 20), ("fill", 10**10), ("fill", 50 << 20)] * 4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_threads_take_turns(worker: LimitedProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: do(worker, ("text", str(n)), ("text", "-")), range(64)))
    assert [kinds(each) for each in found] == [[str(n), "-"] for n in range(64)]


def test_the_thread_that_started_it_may_end(worker: LimitedProcess) -> None:
    threading.Thread(target=lambda: do(worker, ("text", "a"))).run()
    thread = threading.Thread(target=worker.start)
    thread.start()
    thread.join()
    assert kinds(do(worker, ("text", "b"))) == ["b"]


def test_a_fork_has_a_worker_of_its_own(worker: LimitedProcess) -> None:
    mine = do(worker, ("pid", 0))
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, do(worker, ("pid", 0))[0].text.encode())
        finally:
            worker.close()
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read() not in ("", mine[0].text)
    assert do(worker, ("pid", 0)) == mine


_PARENT = f"""
import sys
from tasks.core.limited_process import LimitedProcess, Limits
worker = LimitedProcess(Limits(row_s=50.0))
print(worker.map({DOING!r}, "do", [("pid", 0)])[0].text, flush=True)
if sys.argv[1] == "busy":
    worker.map({DOING!r}, "do", [("hang", None)])
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_it_ends_with_a_parent_that_is_killed(state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.2 if state == "busy" else 0.0)
        parent.kill()
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()  # whoever adopts it may not wait for it
    except OSError:
        return False


def test_a_worker_that_cannot_start_is_told() -> None:
    worker = LimitedProcess(SMALL, modules=("no_such_module",))
    with pytest.raises(TemperError, match="does not start") as caught:
        do(worker, ("text", "a"))
    assert "no_such_module" in caught.value.got
    worker.close()


def test_the_true_limits_hold() -> None:
    worker = LimitedProcess()
    started = time.monotonic()
    found = do(worker, ("fill", 10**10), ("fill", 600 << 20), ("fill", 400 << 20), ("hang", None), ("text", "a"))
    worker.close()
    assert kinds(found) == [MEMORY, MEMORY, str(400 << 20), TIME, "a"]
    assert time.monotonic() - started < 60


def test_the_command_line_starts_no_worker() -> None:
    code = (
        "import sys, flows.cli.main, tasks.render.stage, tasks.core.limited_process as limited\n"
        "assert limited.WORKER._worker is None\n"
        "assert not {'jinja2', 'torch', 'transformers'} & sys.modules.keys(), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_has_no_secrets(worker: LimitedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (names,) = do(worker, ("variables", None))
    assert isinstance(names, Result)
    assert "TOKENIZERS_PARALLELISM" in names.text
    assert "HF_TOKEN" not in names.text
