"""Trainings that are killed by kill -9 at random moments give the same adapter, to the bit, as one that is not.

TEMPER_KILLS says how many kills each method gets; the 30 of the promise are `make kills`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from tests.conftest import digests
from tests.helpers.forked import Forks, attempt, forks_of
from tests.tasks.train import killed_training

KILLS = int(os.environ.get("TEMPER_KILLS", "2"))


@pytest.fixture(scope="module")
def forks() -> Forks:
    return forks_of(killed_training.__name__)


def run(forks: Forks, base: Path, name: str, folder: Path, kill_after_s: float | None = None) -> bool:
    """One attempt; returns whether it came to its end."""
    return attempt(forks, killed_training.training, (base, name, folder), folder, kill_after_s)


@pytest.mark.parametrize("name", killed_training.METHODS)
def test_killed_at_random_moments_it_gives_the_same_adapter(
    forks: Forks, pico_base: Path, tmp_path: Path, name: str
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
