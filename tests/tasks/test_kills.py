"""Trainings that are killed by kill -9 at random moments give the same adapter, to the bit, as one that is not.

TEMPER_KILLS says how many kills each method gets; the 30 of the promise are `make kills`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random

import pytest

from tests.conftest import digests
from tests.tasks import killed_training

KILLS = int(os.environ.get("TEMPER_KILLS", "3"))


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Processes that begin with everything imported, so that kills fall into trainings and not into imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_training.__name__])
    return context


def run(forks: ForkServerContext, base: Path, name: str, folder: Path, kill_after_s: float | None = None) -> bool:
    """One attempt; returns whether it came to its end."""
    folder.mkdir(exist_ok=True)
    process = forks.Process(target=killed_training.training, args=(str(base), name, str(folder)))
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("name", killed_training.METHODS)
def test_killed_at_random_moments_it_gives_the_same_adapter(
    forks: ForkServerContext, pico_base: Path, tmp_path: Path, name: str
) -> None:
    run(forks, pico_base, name, tmp_path / "warm")
    began = time.monotonic()
    assert run(forks, pico_base, name, tmp_path / "whole")
    seconds = time.monotonic() - began
    expected = digests(tmp_path / "whole", "adapter")
    assert "adapter/adapter_model.safetensors" in expected
    random, killed, trial, places = Random(name), 0, 0, set[int]()
    while killed < KILLS:
        trial += 1
        assert trial <= 3 * KILLS + 5, "trainings end before they can be killed"
        folder = tmp_path / f"killed-{trial}"
        if run(forks, pico_base, name, folder, random.uniform(0.1, 0.95) * seconds):
            continue
        killed += 1
        places.add(max((int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*")), default=0))
        assert run(forks, pico_base, name, folder)
        assert digests(folder, "adapter") == expected
    print(f"{name}: {killed} kills, resumed from steps {sorted(places)}; {seconds:.1f} s undisturbed")
