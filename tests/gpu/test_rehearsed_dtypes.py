"""What our own code asks a GPU to compute in 16 bits, against what CUDA has (docs/gpu_dtypes.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.rehearsal import own_operations


def test_no_operation_in_16_bits_is_missing_from_the_table(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPER_COMPUTE_DTYPE", "bfloat16")
    lines = (ROOT / "docs" / "gpu_dtypes.md").read_text().splitlines()
    known = {found[1] for line in lines if (found := re.fullmatch(r"\| `(\w+)` \| yes \| yes \|", line))}
    asked = own_operations(pico_base, tmp_path)
    assert {"mm", "scaled_dot_product_attention", "index_select"} <= asked
    assert asked <= known, "run python -m infra.make_gpu_dtypes"
