"""Memory that runs out: simulated, capped by the operating system, and counted by the kernel."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.adapters.attach import init_adapter
from tasks.core.errors import BadModel, OutOfMemory
from tasks.core.memory import asked_bytes, explain_out_of_memory, kills_for_memory, ran_out
from tasks.core.progress import Progress
from tasks.engine.memory import AdaptiveMicroBatch, adaptive_micro_batch, recompute_activations
from tasks.models.device import compute_dtype, seed_everything
from tasks.train.estimate.meta_model import read_model_config
from tests.conftest import ROOT
from tests.helpers.samples import DPO, LORA, LOREFT, ORPO, QLORA, SFT, method
from tests.helpers.training import loss_of, train
from tests.tasks.train.test_trainer import examples

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1024 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB "
    "of which 12.00 MiB is free."
)


@pytest.mark.parametrize(
    ("error", "short", "asked"),
    [
        (RuntimeError(CPU), True, 1024),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 77 bytes."), True, 77),
        (torch.OutOfMemoryError(GPU), True, 2_684_354_560),
        (MemoryError(), True, None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, None),
        (ValueError("out of memory"), False, None),
    ],
)
def test_it_is_told_from_other_errors(error: Exception, short: bool, asked: int | None) -> None:
    assert ran_out(error) == short
    assert asked_bytes(error) == asked


def test_one_message_says_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(where="train.qlora", fix="take less"):
        raise RuntimeError(CPU)
    assert caught.value.exit_code == 71
    said = str(caught.value)
    assert said.startswith("train.qlora: memory ran out\n  got:      ")
    assert "bytes) free" in said
    assert "expected: 0.00 GiB (1024 bytes) more than the" in said
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(where="x", fix=""):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 1000])
def test_there_are_at_most_as_many_retries_as_halves(rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def never_fits() -> None:
        tried.append(at_once.rows)
        raise RuntimeError(CPU)

    at_once = AdaptiveMicroBatch(rows, fit=True)
    with pytest.raises(RuntimeError):
        at_once.fitted(never_fits)
    assert len(tried) - 1 <= math.log2(rows)
    assert tried[-1] == 1
    assert capsys.readouterr().out.count("memory ran out") == len(tried) - 1
    tried.clear()
    at_once = AdaptiveMicroBatch(rows, fit=False)
    with pytest.raises(RuntimeError):
        at_once.fitted(never_fits)
    assert tried == [rows]


# --- a process that the kernel ended ----------------------------------------------------------------------------------


def test_kills_are_counted_by_the_control_group_or_the_machine(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (tmp_path / "control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    (tmp_path / "old").write_text("oom_kill_disable 0\nunder_oom 0\n")
    assert kills_for_memory((tmp_path / "missing", tmp_path / "events")) == 2
    assert kills_for_memory((tmp_path / "old", tmp_path / "control")) == 5
    assert kills_for_memory((tmp_path / "missing",)) == 0
    assert kills_for_memory() >= 0


def test_after_a_kill_for_memory_the_next_attempt_takes_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 3
    monkeypatch.setattr("tasks.engine.memory.kills_for_memory", lambda: kills)

    def dies(for_memory: int) -> int:
        """One attempt that ends without a word; returns with how many rows it began."""
        nonlocal kills
        attempt = adaptive_micro_batch(4, fit=True, checkpoints=tmp_path)
        rows = attempt.__enter__()
        began, noted = rows.rows, (tmp_path / "attempt.json").read_text()
        attempt.__exit__(None, None, None)
        (tmp_path / "attempt.json").write_text(noted)  # as a kill leaves it
        kills += for_memory
        return began

    assert [dies(0), dies(1), dies(0), dies(1)] == [4, 4, 2, 2]  # a kill for another reason changes nothing
    with adaptive_micro_batch(4, fit=True, checkpoints=tmp_path) as rows:
        assert rows.rows == 1
        kills += 1  # some other process
    with adaptive_micro_batch(4, fit=True, checkpoints=tmp_path) as rows:
        assert rows.rows == 1  # it ended by itself, so it was not that one
    dies(1)
    with (
        pytest.raises(OutOfMemory, match="with one row in a forward pass"),
        adaptive_micro_batch(4, fit=True, checkpoints=tmp_path),
    ):
        raise AssertionError
    assert json.loads((tmp_path / "attempt.json").read_text()) == {
        "kills_for_memory": None,
        "micro_batch_size": 1,
        "recomputing": None,
    }


def test_without_fit_memory_nothing_is_noted(tmp_path: Path) -> None:
    with adaptive_micro_batch(4, fit=False, checkpoints=tmp_path) as rows:
        assert not rows.halve("x")
    assert not list(tmp_path.iterdir())


EXACT = {**QLORA, "compute_dtype": "float32", "dropout": 0.0}

# --- activations that are computed again ------------------------------------------------------------------------------

DROPS = {**LORA, "dropout": 0.3, "targets": "all-linear"}


@pytest.mark.parametrize(("adapter", "objective"), [(DROPS, SFT), (EXACT, ORPO), (EXACT, DPO), (LOREFT, SFT)])
def test_computed_again_they_give_the_same_gradients_to_the_bit_in_less_memory(
    pico_base: Path, adapter: dict[str, Any], objective: dict[str, Any]
) -> None:
    params = method(adapter, objective, batch_size=8)
    trained = examples("qlora" if objective is SFT else "orpo", 8)
    found = []
    for recomputing in (False, True):
        seed_everything(1)
        model = init_adapter(pico_base, params.adapter).train()
        if recomputing:
            recompute_activations(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02
        seed_everything(2)
        loss, _ = loss_of(model, trained, params)
        kept = kept_bytes(lambda model=model: loss_of(model, trained, params)[0])
        loss.backward()
        found.append(([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)], kept))
    (plain, plainly_kept), (again, kept) = found
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert kept < 0.7 * plainly_kept


def kept_bytes(forward: Any) -> int:
    """What autograd keeps of a forward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize(("room_share", "recomputed"), [(2.0, False), (0.99, True)])
def test_so_it_is_done_where_a_training_would_not_fit_by_its_estimate(
    pico_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room_share: float,
    recomputed: bool,
) -> None:
    from tasks.train.estimate import estimate

    params, trained = method(LORA, SFT, fit_memory=True), examples("lora", 8)
    config = read_model_config(pico_base)
    needed = estimate.estimate(config, params, trained, compute_dtype(), torch.device("cpu")).memory.total
    machine = estimate.Machine("cpu", int(room_share * needed), 0)
    monkeypatch.setattr(estimate, "this_machine", lambda device: machine)
    assert estimate.must_recompute(config, params, trained) == recomputed
    assert ("activations are computed again" in capsys.readouterr().out) == recomputed
    prefix = method({"name": "prefix", "tokens": 3, "hidden_size": 8}, SFT, fit_memory=True)
    assert not estimate.must_recompute(config, prefix, trained)


def test_where_that_cannot_be_told_rows_are_all_that_gives_way(
    pico_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks.train.estimate import estimate

    monkeypatch.setattr(estimate, "estimate", _cannot)
    params = method(LORA, SFT, fit_memory=True)
    assert not estimate.must_recompute(read_model_config(pico_base), params, examples("lora", 8))
    assert "whether a step fits cannot be told before it is taken: step: no" in capsys.readouterr().out


def _cannot(*_: Any, **__: Any) -> None:
    raise BadModel("no", where="step")


def test_the_first_attempt_decides_for_all(tmp_path: Path) -> None:
    with adaptive_micro_batch(4, fit=True, checkpoints=tmp_path) as rows:
        assert rows.recomputing(lambda: True)
    with adaptive_micro_batch(4, fit=True, checkpoints=tmp_path) as rows:
        assert rows.recomputing(lambda: False)
    with adaptive_micro_batch(4, fit=False, checkpoints=tmp_path / "other") as rows:
        assert not rows.recomputing(lambda: True)


# --- a training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "objective"), [(EXACT, SFT), (EXACT, ORPO), (LOREFT, SFT)])
def test_a_training_that_runs_out_of_memory_keeps_its_loss_curve(
    pico_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: dict[str, Any],
    objective: dict[str, Any],
) -> None:
    """The allocator gives no more than what passes of two rows take, first in a forward pass and then in a backward."""
    from tasks.train.losses import _LOSSES

    params = method(adapter, objective, batch_size=8, fit_memory=True, epochs=3)
    trained = examples("orpo" if objective is ORPO else "qlora", 16)
    real = _LOSSES[params.objective.name]
    passes: list[int] = []

    def capped(given: Any, asked: Any) -> Any:
        some = given.examples
        passes.append(len(some))
        loss, logged = real(given, asked)
        if len(some) > 4:
            raise RuntimeError(CPU)
        if len(some) > 2 and len(passes) > 4:
            loss.register_hook(_refuse)
        return loss, logged

    def curve(folder: str) -> list[float]:
        seed_everything(1)
        model = init_adapter(pico_base, params.adapter, 6).float()
        model.train()
        log = train(model, trained, params, tmp_path / folder, Progress("t", 1, "steps"))
        return [row["loss"] for row in log]

    whole = curve("whole")
    monkeypatch.setitem(_LOSSES, params.objective.name, capped)
    fitted = curve("fitted")
    assert fitted == pytest.approx(whole, abs=1e-5)
    assert max(passes[-12:]) == 2
    said = capsys.readouterr().out
    assert "going on with micro_batch_size=4: the same gradients" in said
    assert "going on with micro_batch_size=2: the same gradients" in said
    assert said.count("memory ran out") == 2


def _refuse(gradient: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(CPU)


CAPPED = """
import psutil, resource, sys, torch
from torch import nn
from pathlib import Path
from tasks.engine.loop import TrainingPlan, train_loop
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.core.stage import readable_errors
from tasks.core.progress import Progress

torch.set_num_threads(1)
inputs = torch.randn(2048, 64)

def curve(name, fit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1 << 14), nn.Tanh(), nn.Linear(1 << 14, 1))
    rows = AdaptiveMicroBatch(2048, fit=fit)

    def losses(step):
        for start in range(0, 2048, rows.rows):
            yield model(inputs[start : start + rows.rows]).square().sum() / 2048, {}

    course = TrainingPlan(4, lambda step: 1e-3, losses, lambda step: [], 1.0, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = Path(sys.argv[1]) / name
    log = train_loop(course, dict(model.named_parameters()), [optimizer], folder, Progress("t", 4, "s"), rows=rows)
    print("LOSSES", *(row["loss"] for row in log), flush=True)

curve("free", True)
cap = psutil.Process().memory_info().vms + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (cap, resource.RLIM_INFINITY))
curve("fitted", True)
with readable_errors():
    curve("refused", False)
"""


def test_an_allocator_that_the_system_caps(tmp_path: Path) -> None:
    """2048 rows of 16,384 numbers take 134 MB a tensor; under a cap of 300 MB the whole pass does not fit."""
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 71, done.stderr
    free, fitted = ([float(x) for x in curve.split("\n")[0].split()] for curve in done.stdout.split("LOSSES")[1:])
    assert fitted == pytest.approx(free, abs=1e-5)
    before, after = done.stdout.split("LOSSES")[:2]
    assert "memory ran out" not in before
    assert "going on with micro_batch_size=" in after
    assert "\nerror: memory ran out\n  got:      " in done.stderr
    assert "Traceback" not in done.stderr


FAULTS = """
import resource, sys
import torch
from tasks.engine.memory import keep_freed_blocks

if sys.argv[1] == "kept":
    keep_freed_blocks()
for step in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_large_tensors_are_made_of_the_memory_of_those_before() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("kept", "usual")
    }
    assert faults["usual"] >= 32  # every page is zeroed anew, be they of 2 MiB each
    assert faults["kept"] < 10
