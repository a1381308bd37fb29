"""The table of choices, row by row: what is expected is written out here once more, from what the cards can do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from tasks.core.errors import BadParams
from tasks.models import device as devices
from tasks.models.capability import CPU, GPUS, Capability, Choices, choose
from tasks.models.cards import CARDS, card_named
from tasks.models.device import COMPUTE_DTYPE, choices, compute_dtype
from tasks.models.loader import load_model
from tasks.models.quantization import Quantization
from tasks.train.optimizers import optimizer_of
from tests.conftest import ROOT

HALF = Choices("float16", "sdpa", "own", fused_optimizer=True, paged_states=True, tf32=False, compile=False)
AMPERE = Choices("bfloat16", "sdpa", "liger", fused_optimizer=True, paged_states=True, tf32=True, compile=False)
EXPECTED: dict[Capability, Choices] = {
    (6, 1): HALF._replace(dtype="float32"),
    (7, 0): HALF,
    (7, 5): HALF,
    (8, 0): AMPERE,
    (8, 6): AMPERE,
    (8, 9): AMPERE,
    (9, 0): AMPERE,
    (10, 0): AMPERE,
    (12, 0): AMPERE,  # later than all rows
}


@pytest.mark.parametrize("capability", EXPECTED)
def test_a_row_chooses_what_the_card_is_best_at(capability: Capability) -> None:
    found = choose(capability, liger=True)
    assert found == EXPECTED[capability]
    assert found.four_bit_dtype == found.dtype
    assert found.scales_loss == (found.dtype == "float16")
    assert choose(capability) == found._replace(head="own")  # without liger-kernel
    assert choose(capability, dtype="float32") == found._replace(dtype="float32", head="own", tf32=False)
    assert choose(capability, dtype="float16").scales_loss


def test_a_cpu_computes_as_before_there_was_a_table() -> None:
    plain = Choices("float32", "sdpa", "own", fused_optimizer=False, paged_states=False, tf32=False, compile=False)
    assert choose(None) == choose(None, liger=True) == CPU == plain
    assert choose(None, amx=True) == plain._replace(dtype="bfloat16")


def test_every_known_card_has_a_row_of_its_own() -> None:
    assert {card.capability for card in CARDS.values()} == GPUS.keys() - {(0, 0)}
    assert {card.dtype for key, card in CARDS.items() if key in ("v100", "t4")} == {"float16"}
    assert {card.dtype for key, card in CARDS.items() if key not in ("v100", "t4")} == {"bfloat16"}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_card_is_known_by_what_its_driver_calls_it(name: str, key: str | None) -> None:
    assert card_named(name) == (CARDS[key] if key else None)


@pytest.mark.parametrize(
    ("capability", "dtype", "precision"),
    [((7, 5), torch.float16, "ieee"), ((8, 0), torch.bfloat16, "tf32"), ((9, 0), torch.bfloat16, "tf32")],
)
def test_all_ask_the_table(
    capability: Capability, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with such a card: what PyTorch would do with its tensors is not asked for."""
    monkeypatch.delenv(COMPUTE_DTYPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    assert compute_dtype() == dtype
    assert choices(torch.device("cpu")).dtype in ("float32", "bfloat16")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        devices.seed_everything(0)
        assert torch.backends.cuda.matmul.fp32_precision == precision
        monkeypatch.setenv(COMPUTE_DTYPE, "float32")
        assert compute_dtype() == torch.float32
        devices.seed_everything(0)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_four_bit_weights_are_multiplied_in_the_dtype_of_the_table(
    pico_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.models.loader.choices", lambda: choose((7, 5)))
    assert load_model(pico_base, Quantization("nf4")).config.quantization_config.bnb_4bit_compute_dtype == torch.float16
    own = load_model(pico_base, Quantization("nf4", compute_dtype="float32")).config.quantization_config
    assert own.bnb_4bit_compute_dtype == torch.float32


def test_adamw_is_fused_where_its_weights_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(AdamW, "__init__", lambda self, groups, fused: made.append(fused))
    group = {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0}
    optimizer_of("adamw", [group])
    monkeypatch.setattr("tasks.train.optimizers.choices", lambda where: choose((9, 0)))
    optimizer_of("adamw", [group])
    assert made == [None, True]  # None is PyTorch's default


def test_a_model_that_is_loaded_has_the_attention_of_the_table(pico_base: Path) -> None:
    assert load_model(pico_base).config._attn_implementation == choices().attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_variable_stands_for_the_table(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPUTE_DTYPE, dtype)
    assert compute_dtype() == getattr(torch, dtype)
    monkeypatch.setenv(COMPUTE_DTYPE, "float8")
    with pytest.raises(BadParams, match="float32, bfloat16, float16"):
        compute_dtype()
    assert os.environ[COMPUTE_DTYPE] == "float8"


def test_the_table_of_the_documents_is_this_one() -> None:
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    for least, row in GPUS.items():
        wanted = [row.dtype, row.attention, row.head, *map(yes_or_no, row[3:])]
        names = f"{least[0]}.{least[1]}" if least > (0, 0) else "older"
        assert any(line.startswith(f"| {names} ") and cells(line)[2:] == wanted for line in lines), names
    (cpu,) = [cells(line) for line in lines if line.startswith("| CPU ")]
    assert cpu[2:] == [f"{CPU.dtype}; bfloat16 with AMX", CPU.attention, CPU.head, *map(yes_or_no, CPU[3:])]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def yes_or_no(value: object) -> str:
    return "yes" if value else "no"
