"""The pretended device computes as the host does, and refuses what a GPU would refuse or make the host wait for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.models.device import host_read
from tasks.models.pretended_device import DEVICE, DeviceFault, PretendedDevice

HERE = "tests/tasks/models/test_pretended_device.py:"


def on_device(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape).to(DEVICE)


@pytest.mark.parametrize(
    "mixes",
    [
        lambda: on_device(2, 3) @ torch.ones(3, 2),
        lambda: on_device(3)[torch.tensor([0, 2])],
        lambda: F.embedding(torch.tensor([0, 1]), on_device(4, 2)),
        lambda: torch.ones(4, 2)[torch.tensor([0, 1], device=DEVICE)],
        lambda: on_device(3) + torch.ones(3),
        lambda: torch.cat([on_device(3), torch.ones(1)]),
        lambda: torch.where(torch.tensor([True, False, True]), on_device(3), 0.0),
        lambda: on_device(3).add_(torch.ones(3)),
        lambda: on_device(3).index_fill_(0, torch.tensor([1]), 0.0),
    ],
)
def test_an_operation_on_tensors_of_both_sides_is_refused_with_its_line(mixes: Callable[[], Tensor]) -> None:
    with pytest.raises(DeviceFault, match="mixes tensors of the device with") as caught, PretendedDevice():
        mixes()
    assert caught.value.where.startswith(HERE)
    assert "on the device" in caught.value.got
    assert "on the host" in caught.value.got


def test_one_number_of_the_host_may_take_part() -> None:
    with PretendedDevice() as pretended, host_read("the test looks"):
        found = (on_device(3) * torch.tensor(2.0)).cpu()
    assert found.tolist() == [2.0, 4.0, 6.0]
    assert len(pretended.uploads) == 1


READS: list[Callable[[Tensor], object]] = [
    lambda t: t.sum().item(),
    lambda t: t.tolist(),
    lambda t: t[t > 1],
    lambda t: t.nonzero(),
    lambda t: t.cpu(),
    lambda t: torch.empty(3).copy_(t),
    lambda t: t.unique(),
    lambda t: bool(t.any()),
    lambda t: t.long().bincount(),
    lambda t: t.equal(t + 1),
    lambda t: torch.repeat_interleave(t, t.long()),
    lambda t: t.masked_select(t > 1),
    lambda t: t.index_put((t > 1,), t[:2]),
]


@pytest.mark.parametrize("read", READS)
def test_a_read_is_refused_but_where_it_is_meant_and_gives_what_the_host_would(
    read: Callable[[Tensor], object],
) -> None:
    with pytest.raises(DeviceFault, match="makes the host wait") as caught, PretendedDevice():
        read(on_device(3))
    assert caught.value.where.startswith(HERE)
    with PretendedDevice() as pretended:
        with host_read("the test asks"):
            found = read(on_device(3))
        expected = read(torch.arange(1.0, 4.0))
        if isinstance(found, Tensor):
            assert isinstance(expected, Tensor)
            with host_read("the test looks"):
                torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)
        else:
            assert found == expected
    assert pretended.reads[0].reason == "the test asks"
    assert pretended.reads[0].line.startswith(HERE)


def test_what_needs_no_number_is_no_read() -> None:
    with PretendedDevice() as pretended:
        given = on_device(4, 3)
        given[given > 2] = 0.0  # a `masked_fill`
        torch.repeat_interleave(given, torch.tensor([1, 2, 3, 4], device=DEVICE), dim=0, output_size=10)
        assert given.shape == (4, 3)
        assert len(given) == 4
        torch.nn.utils.clip_grad_norm_([given], 1.0)
    assert not pretended.reads


def test_a_fault_that_was_swallowed_is_raised_at_the_end() -> None:
    with pytest.raises(DeviceFault, match="host wait"), PretendedDevice(), suppress(DeviceFault):
        on_device(3).tolist()


def test_draws_on_the_device_take_a_generator_of_the_device() -> None:
    with PretendedDevice(), host_read("the test looks"):
        drawn = on_device(3).uniform_(generator=torch.Generator(DEVICE).manual_seed(4)).cpu()
    assert torch.equal(drawn, torch.empty(3).uniform_(generator=torch.Generator().manual_seed(4)))
    with pytest.raises(DeviceFault, match="by a generator of the other side"), PretendedDevice():
        on_device(3).uniform_(generator=torch.Generator())


def test_views_and_changes_in_place_share_their_numbers() -> None:
    with PretendedDevice(), host_read("the test looks"):
        whole = torch.zeros(2, 3, device=DEVICE)
        whole[1].add_(1)
        whole.t()[2].mul_(5)
        flat = whole.reshape(-1)
        flat[0] = 7
        assert whole.tolist() == [[7.0, 0.0, 0.0], [1.0, 1.0, 5.0]]
        assert whole.view(torch.int32).shape == (2, 3)
        torch.add(whole, 1, out=whole)
        assert torch.tensor([1, 2], device=DEVICE).tolist() == whole.new_tensor([1, 2]).tolist() == [1, 2]
        assert flat.tolist() == [8.0, 1.0, 1.0, 2.0, 2.0, 6.0]


def test_a_training_step_gives_the_bits_of_the_host_and_tied_weights_stay_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.norm(self.embedding(ids)).relu())

    def trained(model: nn.Module, device: torch.device) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            ids = torch.tensor([1, 2, 3, 2], device=device)
            F.cross_entropy(model(ids), ids.roll(1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    torch.manual_seed(0)
    here, there = Tied(), Tied()
    there.load_state_dict(here.state_dict())
    expected = trained(here, torch.device("cpu"))
    with PretendedDevice() as pretended:
        pretended.take(there)
        assert there.head.weight is there.embedding.weight
        with host_read("the test looks"):
            found = trained(there, DEVICE)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
