from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.comparison.energy import CORE_WATTS, Power, machine_power


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Programs are looked for in an empty folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def package(powercap: Path, name: str, microwatts: int) -> None:
    (powercap / name).mkdir(parents=True)
    (powercap / name / "constraint_0_power_limit_uw").write_text(f"{microwatts}\n")


def test_the_limits_of_all_packages_are_added_and_not_those_of_their_parts(tmp_path: Path) -> None:
    package(tmp_path / "cap", "intel-rapl:0", 105_000_000)
    package(tmp_path / "cap", "intel-rapl:1", 105_000_000)
    package(tmp_path / "cap", "intel-rapl:0:0", 50_000_000)  # its cores
    found = machine_power(tmp_path / "cap")
    assert found.watts == 210
    assert "RAPL" in found.source


def test_without_limits_watts_are_assumed_for_each_core(tmp_path: Path) -> None:
    package(tmp_path / "cap", "intel-rapl:0", 0)  # so do processors that have none to set
    for powercap in (tmp_path / "cap", tmp_path / "nothing"):
        found = machine_power(powercap)
        assert found.watts == CORE_WATTS * (os.cpu_count() or 1)
        assert "assumed" in found.source


def test_gpus_come_on_top(tmp_path: Path, no_gpu: Path) -> None:
    program = no_gpu / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 700.00\necho '[N/A]'\necho 300.50\n")
    program.chmod(0o755)
    package(tmp_path / "cap", "intel-rapl:0", 100_000_000)
    found = machine_power(tmp_path / "cap")
    assert found.watts == pytest.approx(1100.5)
    assert "2 GPUs" in found.source


def test_energy_by_hand() -> None:
    assert Power(90.0, "").energy_wh(120) == pytest.approx(3.0)
