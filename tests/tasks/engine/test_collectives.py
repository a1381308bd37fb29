"""Two processes that train together are held to one that trains alone: real processes, which talk by gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.adapters.files import WEIGHTS
from tasks.adapters.params import FullAdapter, LoraAdapter
from tasks.core import ranks
from tasks.core.errors import BadInput, BadParams
from tasks.core.ranks import World
from tasks.engine import collectives
from tasks.engine.collectives import share_of_rank
from tasks.train import fsdp
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.samples import LORA
from tests.tasks.train.launched_training import METHODS, ROWS, SHARDED, STOPPED, training

TOGETHER = ["sft", "orpo", "kto", "dpo", "adalora", "reft", "dropout", STOPPED]
SHARED_OUT = ["orpo", "kto", "qlora"]
PLACES = [*TOGETHER, *(f"{SHARDED}-{name}" for name in SHARED_OUT)]
OF_A_REFERENCE = ["kto", "dpo"]
HELD_TO_ONE = [place for place in PLACES if place not in ("dropout", STOPPED)]


@pytest.fixture(scope="module")
def launched(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind of all trainings."""
    folder = tmp_path_factory.mktemp("launched")
    command = ["-m", "accelerate.commands.launch", "--config_file", "infra/launch/gloo.yaml"]
    words = ["-m", "tests.tasks.train.launched_training", str(pico_base), str(folder), *TOGETHER, SHARDED, *SHARED_OUT]
    done = subprocess.run(
        [sys.executable, *command, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("sft: 6/6 steps") == 1  # the first speaks for both
    return folder


@pytest.fixture(scope="module")
def alone(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of this process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in {"dropout", *HELD_TO_ONE, *SHARED_OUT} & METHODS.keys():
        training(pico_base, name, folder / name)
    return folder


def note(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"process-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("place", HELD_TO_ONE)
def test_two_processes_give_the_curve_of_one(launched: Path, alone: Path, place: str) -> None:
    one, two = (note(folder)["log"] for folder in (alone / place.removeprefix(f"{SHARDED}-"), launched / place))
    assert len(one) == len(two) == 6
    if place.removeprefix(f"{SHARDED}-") in OF_A_REFERENCE:
        del one[0]["accuracy"], two[0]["accuracy"]  # of margins that are zero until the first update, but for rounding
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("place", HELD_TO_ONE)
def test_and_its_adapter_which_is_written_once(launched: Path, alone: Path, place: str) -> None:
    one, two = (load_file(folder / WEIGHTS) for folder in (alone / place.removeprefix(f"{SHARDED}-"), launched / place))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Adam divides a gradient by its size: where that is next to nothing, its rounding is as large as a step
        assert (two[name] - tensor).norm() < 1e-3 * tensor.norm()
    config = (launched / place / "adapter_config.json").read_text()
    assert config == (alone / place.removeprefix(f"{SHARDED}-") / "adapter_config.json").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_both_processes_come_to_the_same(launched: Path, place: str) -> None:
    assert note(launched / place, 0) == note(launched / place, 1)


def test_what_drops_out_is_the_processes_own(launched: Path, alone: Path) -> None:
    """Else the rows of both would lose the same features, and a step would be that of half as many rows."""
    one, two = (note(folder / "dropout")["log"] for folder in (alone, launched))
    assert one[-1]["held_out_loss"] == pytest.approx(two[-1]["held_out_loss"], abs=0.05)
    assert one[1]["loss"] != pytest.approx(two[1]["loss"], abs=1e-5)


def test_a_resumed_training_draws_what_it_would_have_drawn(launched: Path) -> None:
    whole, resumed = launched / "dropout", launched / STOPPED
    assert note(resumed) == note(whole)
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", SHARED_OUT)
def test_each_process_holds_half_of_the_layers(launched: Path, alone: Path, name: str) -> None:
    from safetensors import safe_open

    whole, share = note(alone / name)["held"], note(launched / f"{SHARDED}-{name}")["held"]
    with safe_open(launched / f"{SHARDED}-{name}" / WEIGHTS, "pt") as file:
        trained = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  # it is no mapping
    beside = 300 * 32  # more than the embedding and the head of the pico model have, which stay whole
    assert (whole - trained - beside) / 2 < share - trained < whole - trained


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", range(1, 12))
def test_every_row_counts_once_and_all_processes_are_in_step(rows: int, processes: int, size: int) -> None:
    hands = [share_of_rank(range(rows), size, World(rank, processes, rank)) for rank in range(processes)]
    assert Counter(n for hand in hands for part, counts in hand if counts for n in part) == Counter(range(rows))
    assert len({tuple(len(part) for part, _ in hand) for hand in hands}) == 1
    assert all(0 < len(part) <= size for hand in hands for part, _ in hand)


def test_one_process_takes_the_parts_that_it_always_took() -> None:
    assert share_of_rank([1, 2, 3, 4, 5], 2, ranks.ALONE) == [([1, 2], True), ([3, 4], True), ([5], True)]


def test_rows_of_like_length_go_to_different_processes() -> None:
    """A batch's rows are in the order of their lengths."""
    first, second = (share_of_rank([1, 2, 8, 9], 2, World(rank, 2, rank)) for rank in (0, 1))
    assert [part for part, _ in first + second] == [[1, 8], [2, 9]]


# --- what is told and refused -----------------------------------------------------------------------------------------


def test_a_process_alone_adds_up_to_itself() -> None:
    assert collectives.sum_over_ranks({"loss": 1.5}) == {"loss": 1.5}
    assert collectives.any_rank(True)
    assert not collectives.any_rank(False)
    parameter = torch.nn.Parameter(torch.ones(2))
    collectives.sum_gradients([parameter])
    assert parameter.grad is None


def two(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    monkeypatch.setattr(ranks, "_world", World(0, 2, 0))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "sharded"),
    [
        ({}, False),
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, True),
    ],
)
def test_the_launcher_says_whether_weights_are_sharded(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sharded: bool
) -> None:
    two(monkeypatch, **variables)
    assert ranks.shards_weights() == sharded
    monkeypatch.setattr(ranks, "_world", ranks.ALONE)
    assert not ranks.shards_weights()


def test_weights_that_are_trained_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    two(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    fsdp.check_can_shard(LoraAdapter.model_validate(LORA))
    with pytest.raises(BadParams, match="cannot be sharded, since they are trained"):
        fsdp.check_can_shard(FullAdapter.model_validate({"name": "full", "modules": "all"}))


@pytest.mark.parametrize(
    ("variables", "got"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP_VERSION=1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds.json"),
    ],
)
def test_what_a_configuration_asks_for_in_vain_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], got: str
) -> None:
    two(monkeypatch, **variables)
    with pytest.raises(BadParams, match="asks for what temper does not do") as caught:
        fsdp.check_can_shard(METHODS["sft"].adapter)
    assert caught.value.got == got


def test_processes_that_see_other_checkpoints_do_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines that do not share a disk: the first has step 4, this one none."""
    monkeypatch.setattr(ranks, "_world", World(1, 2, 1))
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda numbers: {"": 4.0 + next(iter(numbers.values()))})
    with pytest.raises(BadInput, match="do not agree on the newest checkpoint") as caught:
        collectives.check_agreed("the newest checkpoint", 0, fix="share it")
    assert (caught.value.got, caught.value.expected) == ("0", "4, as the first has it")


def test_rows_are_not_shared_evenly() -> None:
    assert [n % 2 for n in (ROWS, ROWS % 4)] == [1, 1]
