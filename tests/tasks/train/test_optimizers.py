"""Optimizers against their formulas; what they take up is their own affair."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tasks.engine.checkpoints import Checkpoint, latest, pack_tensors, save, structure_of, unpack_tensors
from tasks.engine.loop import Averaging
from tasks.train.optimizers import optimizer_of
from tasks.train.params import OptimizerName

NAMES = [name for name in get_args(OptimizerName) if name != "adamw_schedule_free" or find_spec("schedulefree")]
RATE, DECAY = 0.01, 0.1


def start() -> torch.nn.Parameter:
    """Large enough for states in 8 bits, which small tensors do not get."""
    return torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))


def step(optimizer: Any, weight: torch.nn.Parameter, number: int) -> None:
    if isinstance(optimizer, Averaging):
        optimizer.train()
    for group in optimizer.param_groups:
        group["lr"] = RATE
    weight.grad = None
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    (weight - target).square().sum().backward()
    optimizer.step()


def adamw(weight: torch.Tensor, steps: int) -> torch.Tensor:
    """Algorithm 2 of arXiv:1711.05101 in float64, with beta 0.9 and 0.999 and epsilon 1e-8."""
    w, m, v = weight.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t in range(1, steps + 1):
        g = 2 * (w - torch.randn(w.shape, generator=torch.Generator().manual_seed(t)))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        w = w * (1 - RATE * DECAY) - RATE * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def lion(weight: torch.Tensor, steps: int) -> torch.Tensor:
    """Algorithm 2 of arXiv:2302.06675 in float64, with beta 0.9 and 0.99."""
    w, m = weight.double(), torch.zeros(()).double()
    for t in range(1, steps + 1):
        g = 2 * (w - torch.randn(w.shape, generator=torch.Generator().manual_seed(t)))
        w = w * (1 - RATE * DECAY) - RATE * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    return w


def schedule_free(weight: torch.Tensor, steps: int) -> torch.Tensor:
    """Algorithm 1 of arXiv:2405.15682 in float64 with a constant rate, beta 0.9 and 0.999: the average x."""
    x = z = weight.double()
    v = torch.zeros(()).double()
    for t in range(1, steps + 1):
        y = 0.1 * z + 0.9 * x
        g = 2 * (y - torch.randn(y.shape, generator=torch.Generator().manual_seed(t)))
        v = 0.999 * v + 0.001 * g.square()
        z = z - RATE * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * y)
        x = (1 - 1 / t) * x + z / t
    return x


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_the_steps_of_its_paper(name: OptimizerName) -> None:
    weight = start()
    optimizer = optimizer_of(name, [{"params": [weight], "weight_decay": DECAY}, {"params": [], "weight_decay": 0.0}])
    paper = lion if name.startswith("lion") else schedule_free if name == "adamw_schedule_free" else adamw
    expected = paper(start().detach(), 5)
    for number in range(1, 6):
        step(optimizer, weight, number)
    if isinstance(optimizer, Averaging):
        optimizer.eval()
    off = (weight.detach() - expected).abs()
    # in 8 bits a state is off by a percent or so, and a sign may flip where it is close to zero
    assert off.quantile(0.99) < (RATE if name.endswith("8bit") else 1e-5)
    assert off.max() <= (5 * 2 * RATE if "8bit" in name or name.startswith("lion") else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_from_a_checkpoint_it_goes_on_to_the_same_bits(name: OptimizerName, tmp_path: Path) -> None:
    def begun() -> tuple[torch.nn.Parameter, Any]:
        weight, other = start(), start()  # two, since bitsandbytes lets states share their tables
        other.grad = torch.ones_like(other)
        return weight, optimizer_of(name, [{"params": [weight, other], "weight_decay": DECAY}])

    whole, optimizer = begun()
    for number in range(1, 7):
        step(optimizer, whole, number)
        if number == 3:
            save(tmp_path, Checkpoint(3, pack_tensors({"w": whole}, [optimizer]), [], structure_of([optimizer])))
    resumed, optimizer = begun()
    found = latest(tmp_path)
    assert found
    unpack_tensors(found.tensors, {"w": resumed}, [optimizer])
    for number in range(4, 7):
        step(optimizer, resumed, number)
    assert torch.equal(whole, resumed)


def test_no_other_optimizer_is_taken_for_one_that_averages() -> None:
    averaging = {n for n in NAMES if isinstance(optimizer_of(n, [{"params": [start()], "weight_decay": 0}]), Averaging)}
    assert averaging == {"adamw_schedule_free"} & set(NAMES)


def test_paged_states_without_a_gpu_are_said_to_be_plain(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer_of("paged_adamw", [{"params": [start()], "weight_decay": 0.0}])
    assert torch.cuda.is_available() or "no GPU to page from" in capsys.readouterr().out
