"""Trainings on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tasks.train.test_trainer import METHODS, trained

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_adapter_and_so_does_a_resumed_training(
    pico_base: Path, tmp_path: Path, name: str
) -> None:
    whole = trained(pico_base, name, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        trained(pico_base, name, tmp_path / "two", die_after=3)
    resumed = trained(pico_base, name, tmp_path / "two")
    assert all(tensor.isfinite().all() for tensor in whole.values())
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
