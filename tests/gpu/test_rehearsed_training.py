"""Trainings on a pretended device: whatever a GPU would refuse, or wait for, is found on a machine without one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.rehearsal import ADAPTERS, OBJECTIVES, STEPS, on_host, rehearsed, trained_by

ROUNDING = {"lora8bit": 1e-2, "full": 1e-4}
"""By adapter what losses may differ by: other kernels of attention, and integers that it rounds to."""
A_STEP, A_CHECKPOINT = (
    "a step's numbers, all at once, before the optimizer takes it",
    "tensors that are written to a file",
)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_mixes_no_devices_and_the_host_reads_once(
    pico_base: Path, tmp_path: Path, adapter: str, objective: str
) -> None:
    params = trained_by(adapter, objective)
    there = rehearsed(pico_base, params, tmp_path / "there")
    reads = Counter(read.reason for read in there.reads)
    assert reads.pop(A_CHECKPOINT) > 0  # after the last step
    assert reads.pop("whether weights are finite, before they are written") == 1
    assert reads.pop("the form of the head, once for a model", 0) in (0, 4)  # in the first forward pass
    assert (
        reads.pop("where prompts end, once a pass, unless whoever runs the model has said it", 0) <= 1
    )  # in that, too
    assert (reads.pop("which ranks are taken away", 0) > 0) == (adapter == "adalora")
    assert reads == {A_STEP: STEPS}
    assert there.uploads == []
    if objective == "sft" or adapter == "lora":
        here = on_host(pico_base, params, tmp_path / "here")
        losses = [[row["loss"] for row in log] for log in (there.log, here)]
        assert losses[0] == pytest.approx(losses[1], rel=ROUNDING.get(adapter, 1e-5))


@pytest.mark.parametrize("adapter", ["lora of the last layer", "loreft"])
def test_what_is_kept_of_frozen_layers_from_epoch_to_epoch(pico_base: Path, tmp_path: Path, adapter: str) -> None:
    params = trained_by(adapter, "dpo" if adapter == "loreft" else "sft", epochs=2)
    there = rehearsed(pico_base, params, tmp_path / "there")
    assert there.training.losses.below is not None
    assert Counter(read.reason for read in there.reads)[A_STEP] == 2 * STEPS
    assert there.uploads == []
    losses = [[row["loss"] for row in log] for log in (there.log, on_host(pico_base, params, tmp_path / "here"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "lion", "adamw_schedule_free"])
def test_other_optimizers(pico_base: Path, tmp_path: Path, optimizer: str) -> None:
    schedule = "constant" if optimizer == "adamw_schedule_free" else "cosine"
    params = trained_by("lora", "sft", optimizer=optimizer, schedule=schedule)
    there = rehearsed(pico_base, params, tmp_path)
    assert Counter(read.reason for read in there.reads)[A_STEP] == STEPS


@pytest.mark.parametrize("adapter", ["full", "lora", "qlora", "loreft"])
def test_float16_is_trained_by_a_scaled_loss_with_no_further_read(
    pico_base: Path, tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = trained_by(adapter, "sft")
    here = on_host(pico_base, params, tmp_path / "here")
    monkeypatch.setenv("TEMPER_COMPUTE_DTYPE", "float16")
    there = rehearsed(pico_base, params, tmp_path / "there")
    assert Counter(read.reason for read in there.reads)[A_STEP] == STEPS
    assert there.uploads == []
    assert [(row["loss_scale"], row["skipped"]) for row in there.log] == [(2.0**16, 0)] * STEPS
    losses = [[row["loss"] for row in log] for log in (there.log, here)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
