"""A merge that is killed by kill -9 at random moments leaves no folder, or a whole one; the next gives the same bytes.

TEMPER_KILLS says how many kills there are; the 50 of the promise are `make kills`.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random

from tasks.core.artifacts import read_manifest
from tests.conftest import digests
from tests.flows.files import killed_merging
from tests.helpers.forked import attempt, forks_of
from tests.tasks.deltas.test_weight_deltas import llama, perturbed, saved

KILLS = int(os.environ.get("TEMPER_KILLS", "5"))


def test_no_half_merged_folder_is_ever_seen(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    forks = forks_of(killed_merging.__name__)
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=4096)
    base = saved(model, tmp_path / "base")
    adapter = saved(
        perturbed(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))), tmp_path / "adapter"
    )

    def run(out: Path, kill_after_s: float | None = None) -> bool:
        return attempt(forks, killed_merging.merging, (base, adapter, out), tmp_path, kill_after_s)

    run(tmp_path / "warm")
    began = time.monotonic()
    assert run(tmp_path / "whole")
    seconds = time.monotonic() - began
    expected = digests(tmp_path, "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 20
    random, killed, seen, trial = Random(0), 0, set[int](), 0
    out = tmp_path / "out"
    while killed < KILLS:
        trial += 1
        assert trial < 5 * KILLS + 5, "merges end before they can be killed"
        done = run(out, random.uniform(0.02, 1.0) * seconds)
        killed += not done
        seen.add(max((len(list(draft.iterdir())) for draft in tmp_path.glob(".out.draft-*")), default=0))
        if out.exists():
            read_manifest(out)  # whole, though the process may have been killed right after
            shutil.rmtree(out)
    assert run(out)
    assert {name.replace("out/", "whole/"): sha for name, sha in digests(tmp_path, "out").items()} == expected
    assert not list(tmp_path.glob(".out.draft-*"))
    print(f"{killed} kills, with up to {max(seen)} files written; {seconds:.2f} s undisturbed")
