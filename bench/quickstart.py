"""Times the quickstart in a fresh clone: the whole run, a run with nothing changed, and DVC alone on the same.

    .venv/bin/python -m bench.quickstart [--again 3]

Prints one table. Nothing else should run meanwhile; the load before the start is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.clock import ROOT, machine

TEMPER = [sys.executable, "-m", "flows.cli"]
DVC = [sys.executable, "-m", "dvc"]


def seconds(command: list[str], folder: Path) -> float:
    """Measure the wall time of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return taken


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=int, default=3, help="how often the unchanged graph is timed")
    again = parser.parse_args().again
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "temper"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows = {
            "temper run, fresh clone": [seconds([*TEMPER, "run"], clone)],
            "temper run, nothing changed": [seconds([*TEMPER, "run"], clone) for _ in range(again)],
            "dvc repro, nothing changed": [seconds([*DVC, "repro"], clone) for _ in range(again)],
            "dvc status": [seconds([*DVC, "status"], clone) for _ in range(again)],
            "temper status": [seconds([*TEMPER, "status"], clone) for _ in range(again)],
        }
        told = json.loads(
            subprocess.run([*TEMPER, "status", "--json"], cwd=clone, capture_output=True, check=True).stdout
        )
    print("\n| command | median s | least | most |\n|---|---|---|---|")
    for name, times in rows.items():
        print(f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} | {max(times):.1f} |")
    print("\n| model | exact match | loss |\n|---|---|---|")
    for name, figures in {"base": told["base"], **told["methods"]}.items():
        print(f"| {name} | {figures['exact_match']:.3f} | {figures['loss']:.3f} |")
    print("\n| stage | seconds |\n|---|---|")
    for name, stage in told["stages"].items():
        print(f"| {name} | {stage['seconds']:.1f} |")


if __name__ == "__main__":
    main()
