"""How much power this machine may draw: what an estimate of energy rests on. Nothing is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CORE_WATTS = 12.0
"""Of a core of a processor that is not known, in the tool of Green Algorithms: data/latest/TDP_cpu.csv, "Any".

Lannelongue, Grealey, Inouye 2021, doi:10.1002/advs.202100707.
"""
POWERCAP = Path("/sys/class/powercap")


class Power(NamedTuple):
    """Watts, and one sentence on where they come from."""

    watts: float
    source: str

    def energy_wh(self, seconds: float) -> float:
        """What that makes in so many seconds, in watt-hours."""
        return self.watts * seconds / 3600


def machine_power(powercap: Path = POWERCAP) -> Power:
    """The processors' and the GPUs' power limits, added; of processors that tell none, so many watts a core."""
    parts = [_processors(powercap), *_gpus()]
    return Power(sum(part.watts for part in parts), " and ".join(part.source for part in parts))


def _processors(powercap: Path) -> Power:
    """The limit that RAPL holds every processor package to in the long run."""
    limits = [
        int(limit.read_text()) / 1e6
        for package in sorted(powercap.glob("*-rapl:[0-9]*"))
        if package.name.count(":") == 1 and (limit := package / "constraint_0_power_limit_uw").is_file()
    ]
    if sum(limits):
        return Power(sum(limits), f"{sum(limits):.0f} W, the processors' long-term power limit as RAPL tells it")
    cores = os.cpu_count() or 1
    return Power(
        CORE_WATTS * cores, f"{CORE_WATTS * cores:.0f} W, an assumed {CORE_WATTS:.0f} W for each of {cores} cores"
    )


def _gpus() -> list[Power]:
    """The power limit of all GPUs that `nvidia-smi` lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    limits = [float(line) for line in done.stdout.split("\n") if line.strip().replace(".", "", 1).isdigit()]
    count = "the GPU" if len(limits) == 1 else f"{len(limits)} GPUs"
    return [Power(sum(limits), f"{sum(limits):.0f} W, the power limit of {count}")] if limits else []
