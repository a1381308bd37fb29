"""Times the quickstart in a fresh clone: the whole run, and commands on what it made.

    .venv/bin/python -m bench.quickstart [--again 3]

Prints wall and processor seconds of each, and who used the processor in the whole run. Nothing else should run
meanwhile; the load before the start is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.clock import ROOT, machine

TEMPER = [sys.executable, "-m", "flows.cli"]
DVC = [sys.executable, "-m", "dvc"]


USERS = {
    "flows.run.server_process": "Prefect's temporary server",
    "flows.cli": "the flow: order, board, gate, page",
    "tasks.orchestration.fork_server": "libraries imported once, forks made",
    "dvc": "DVC",
    "tasks.": "stages: work, and what they import themselves",
}
"""Whose time a process is, by what its command line has in it; the first that fits."""


class Taken(NamedTuple):
    """Seconds of a command: on the clock, and of the processor with all processes that it started."""

    wall: float
    processor: float


def taken(command: list[str], folder: Path) -> Taken:
    """Measure a command that must succeed."""
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, os.times()
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return Taken(wall, used)


@contextmanager
def watched(every_s: float = 0.02) -> Iterator[dict[tuple[int, float], tuple[str, float]]]:
    """Note the last command line and processor seconds of each process below this one, by its id and birth."""
    seen: dict[tuple[int, float], tuple[str, float]] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    seen[process.pid, process.create_time()] = " ".join(process.cmdline()), times.user + times.system

    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    ended.set()
    watcher.join()


def split(seen: dict[tuple[int, float], tuple[str, float]], total: float) -> dict[str, float]:
    """Add up the processor seconds by whose they are; what was too short to be seen is the rest of the total."""
    sums = dict.fromkeys(USERS.values(), 0.0)
    for command, used in seen.values():
        user = next((name for mark, name in USERS.items() if mark in command), None)
        if user:
            sums[user] += used
    return {**sums, "git, shells, and what was too short to be seen": total - sum(sums.values())}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, default=3, help="how often the unchanged graph is timed")
    again = parser.parse_args().again
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "temper"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        with watched() as seen:
            rows = {"temper run, fresh clone": [taken([*TEMPER, "run"], clone)]}
        users = split(seen, rows["temper run, fresh clone"][0].processor)
        for words in (
            [*TEMPER, "run"],
            [*DVC, "repro"],
            [*DVC, "status"],
            [*TEMPER, "status"],
            [*TEMPER, "history"],
            [*TEMPER, "compare", "1", "3"],
            [*TEMPER, "promote"],
        ):
            name = " ".join(words[2:]).removeprefix("flows.cli ")
            said = f"temper {name}" if words[:3] == TEMPER else name
            rows[f"{said}, nothing changed"] = [taken(words, clone) for _ in range(again)]
        told = json.loads(
            subprocess.run([*TEMPER, "status", "--json"], cwd=clone, capture_output=True, check=True).stdout
        )
    print("\n| command | median s | least | most | processor s |\n|---|---|---|---|---|")
    for name, times in rows.items():
        walls = [each.wall for each in times]
        used = statistics.median(each.processor for each in times)
        print(f"| {name} | {statistics.median(walls):.1f} | {min(walls):.1f} | {max(walls):.1f} | {used:.1f} |")
    print("\n| who used the processor in the fresh clone | s |\n|---|---|")
    for name, used in users.items():
        print(f"| {name} | {used:.1f} |")
    print("\n| model | exact match | loss |\n|---|---|---|")
    for name, figures in {"base": told["base"], **told["methods"]}.items():
        print(f"| {name} | {figures['exact_match']:.3f} | {figures['loss']:.3f} |")
    print("\n| stage | seconds |\n|---|---|")
    for name, stage in told["stages"].items():
        print(f"| {name} | {stage['seconds']:.1f} |")


if __name__ == "__main__":
    main()
