"""Evaluations that are killed by kill -9 at random moments give the same report, to the byte, as one that is not.

TEMPER_KILLS says how many kills there are; the 20 of the promise (F13) are part of `make kills`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from tests.conftest import digests
from tests.helpers.forked import Forks, attempt, forks_of
from tests.helpers.samples import write_lines
from tests.tasks.evaluate import killed_evaluation

KILLS = int(os.environ.get("TEMPER_KILLS", "3"))


@pytest.fixture(scope="module")
def forks() -> Forks:
    return forks_of(killed_evaluation.__name__)


def questions(folder: Path) -> Path:
    random = Random(5)
    words = ["cat", "dog", "bird", "horse", "cow", "1", "2", "3", "狗"]
    rows = [
        {
            "question": " ".join(random.choices(words, k=random.randint(2, 20))),
            "choices": random.sample(words, 4),
            "answer": random.randrange(4),
            "target": random.choice(words),
        }
        for _ in range(40)
    ]
    return write_lines(folder / "rows.jsonl", rows)


def test_killed_at_random_moments_it_gives_the_same_report(forks: Forks, pico_base: Path, tmp_path: Path) -> None:
    rows = questions(tmp_path)

    def run(folder: Path, kill_after_s: float | None = None) -> bool:
        return attempt(forks, killed_evaluation.evaluation, (pico_base, rows, folder), folder, kill_after_s)

    assert run(tmp_path / "warm")
    began = time.monotonic()
    assert run(tmp_path / "whole")
    seconds = time.monotonic() - began
    expected = digests(tmp_path / "whole", "report")
    assert set(expected) == {"report/examples.parquet", "report/metrics.json"}
    random, killed, trial, kept = Random("evaluation"), 0, 0, list[int]()
    while killed < KILLS:
        trial += 1
        assert trial <= 3 * KILLS + 5, "evaluations end before they can be killed"
        folder = tmp_path / f"killed-{trial}"
        if run(folder, random.uniform(0.1, 0.95) * seconds):
            continue
        killed += 1
        assert "report/metrics.json" not in digests(folder, "report")
        kept.append(len(list(folder.glob("journals/*/*.json"))))
        assert run(folder)
        assert digests(folder, "report") == expected
    print(f"evaluation: {killed} kills, with {sorted(kept)} files kept; {seconds:.1f} s undisturbed")
