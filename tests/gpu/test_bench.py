"""The measurements for a card, driven on the CPU at pico shapes: that they run is tested, not what they say."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import GOALS, PATHS, Goal, Measurement, OutOfTime, time_limit
from tasks.models.pretended_device import PretendedDevice

SIZES = ("135M", "1.1B", "8B")


def told(out: Path, only: str) -> dict[str, dict[str, Any]]:
    gpu.main(["--pretend", "--only", only, "--out", str(out), "--minutes", "30"])
    everything = json.loads(out.read_text())
    assert everything["pretended"]
    assert everything["choices"]["attention"] == "sdpa"
    return {each["name"]: each for each in everything["results"]}


def test_every_path_agrees_with_the_cpu_in_both_types(tmp_path: Path) -> None:
    """Here bfloat16 is the CPU's: it rounds as a card does."""
    found = told(tmp_path / "gpu.json", "agreement")
    assert found.keys() == {f"agreement, {path}" for path in PATHS}
    for name, each in found.items():
        assert each["status"] == "done"
        assert each["off_float32"] == 0
        assert each["agrees_float32"]
        if name not in ("agreement, generation", "agreement, merge probe"):  # which may differ in 16 bits
            assert each["off_bfloat16"] > 0
            assert each["agrees_bfloat16"]
    assert 0 < found["agreement, merge probe"]["off_bfloat16"] < 0.01


def test_every_training_is_measured_beside_its_anchor(tmp_path: Path) -> None:
    found = told(tmp_path / "gpu.json", SIZES[-1])  # the other sizes are the same work on other shapes
    assert found.keys() == {f"{kind}, {SIZES[-1]}" for kind in GOALS}
    for name, each in found.items():
        anchored = not name.startswith("ReFT")
        assert each["status"] == "done"
        assert each["tokens_per_s"] > 0
        assert each["share_of_peak"] > 0
        assert ("times_trl" in each) == ("Liger is skipped" in each["anchor"]) == anchored


@pytest.mark.parametrize("kind", GOALS)
def test_a_step_of_a_benchmark_mixes_no_devices(kind: str, tmp_path: Path) -> None:
    place = gpu.the_pretence()
    work = gpu.work_of(kind, SIZES[0], place, tmp_path)
    base = gpu.random_model(gpu.PICO, place.dtype, place.device, four_bit=kind == "QLoRA")
    model = gpu.with_adapter(base, kind, moved=False)
    with PretendedDevice() as pretended:
        pretended.take(model)
        work.loss(model, work.batches[0])  # what is found out once for a model is read
        reads, uploads = len(pretended.reads), len(pretended.uploads)
        work.loss(model, work.batches[0]).backward()
        assert pretended.reads[reads:] == pretended.uploads[uploads:] == []


def test_a_run_without_time_says_what_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--pretend", "--out", str(tmp_path / "gpu.json"), "--minutes", "0"])
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert {each["status"] for each in results} == {"skipped: no time left"}
    trainings = [each["name"] for each in results if "agreement" not in each["name"]]
    assert trainings == [f"{kind}, {size}" for size in SIZES for kind in GOALS]
    assert "times_trl not measured (goal >= 1.5)" in capsys.readouterr().out


def test_what_is_cut_off_keeps_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        yield {"share_of_peak": 0.5}
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as libraries do
                continue

    record: dict[str, Any] = {}
    each = Measurement("a", 0.05, endless, (Goal("share_of_peak", 0.45),))
    gpu.measured(each, gpu.the_pretence(), 60.0, lambda: None, record)
    assert record["share_of_peak"] == 0.5
    assert record["status"].startswith("cut off")
    assert "share_of_peak 0.50 (goal >= 0.45: met)" in gpu.line_of(each, record)


def test_a_failure_is_told_and_makes_the_run_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {}
        raise ValueError("no such kernel")

    def off() -> Iterator[dict[str, Any]]:
        yield {"off_float32": 1.0, "agrees_float32": False}

    def full() -> Iterator[dict[str, Any]]:
        yield {}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    given = [Measurement(name, 5, work) for name, work in (("a", broken), ("b", off), ("c", full))]
    monkeypatch.setattr(gpu, "measurements", lambda place: given)
    with pytest.raises(SystemExit, match="failed: a; not as on the CPU: b"):
        gpu.main(["--pretend", "--out", str(tmp_path / "gpu.json")])
    statuses = [each["status"] for each in json.loads((tmp_path / "gpu.json").read_text())["results"]]
    assert statuses == ["FAILED: ValueError: no such kernel", "done", "does not fit this card's memory"]


def test_the_clock_rings_only_within_its_block() -> None:
    with pytest.raises(OutOfTime), time_limit(0.01):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_card_it_says_so() -> None:
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu.main([])
