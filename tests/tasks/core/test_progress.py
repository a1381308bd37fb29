"""What long work shows: a bar where there is a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

WORK = """
import time
from tasks.core.progress import Progress
with Progress("outer", 2, "files") as files:
    files.step()
    with Progress("train", 5, "steps") as steps:
        steps.go_on_from(2)
        print("an answer", flush=True)
        steps.step("loss 1.25")
        steps.step("[brackets]", by=2)
        time.sleep(0.3)  # it is drawn ten times a second
    files.step()
"""


def test_without_a_terminal_there_are_lines() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == "an answer\n"
    lines = done.stderr.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "outer: 1/2 files",
        "train: 3/5 steps",
        "train: 5/5 steps",
        "outer: 2/2 files",
    ]
    assert lines[1].endswith("loss 1.25")


def test_in_a_terminal_there_is_a_bar_and_what_goes_to_a_file_stays_clean(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    with (tmp_path / "out.txt").open("w") as file:
        variables = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        subprocess.run([sys.executable, "-c", WORK], stdout=file, stderr=end, env=variables, check=True)
    os.close(end)
    shown = ""
    while True:
        try:
            block = os.read(terminal, 1 << 16).decode()
        except OSError:  # what Linux says at the end
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    assert (tmp_path / "out.txt").read_text() == "an answer\n"
    assert "outer" in shown
    assert "5/5" in shown
    assert "[brackets]" in shown
