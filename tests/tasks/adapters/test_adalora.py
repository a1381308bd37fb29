"""What AdaLoRA needs of a training, against PEFT's own forward pass and the plan of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.adapters.adalora import orthogonality_penalty
from tasks.adapters.attach import init_adapter, load_adapted, published_state, save_adapter
from tasks.core.errors import BadModel
from tasks.core.progress import Progress
from tests.helpers.samples import ADALORA, SFT, method
from tests.helpers.training import train
from tests.tasks.train.test_trainer import examples

METHOD = method({**ADALORA, "warmup_steps": 2, "final_steps": 2}, SFT, epochs=3, learning_rate=0.05)


def test_the_penalty_is_what_peft_adds_to_a_loss(pico_base: Path) -> None:
    model: Any = init_adapter(pico_base, METHOD.adapter, 9)
    ids = torch.arange(5, 25)[None]
    with_penalty = model(input_ids=ids, labels=ids).loss
    without = model.get_base_model()(input_ids=ids, labels=ids).loss
    expected = without + 0.5 * orthogonality_penalty(model)
    torch.testing.assert_close(with_penalty, expected, rtol=1e-5, atol=1e-6)


def test_ranks_are_moved_until_their_average_is_the_target(pico_base: Path, tmp_path: Path) -> None:
    """Fourteen updates of rank 4 begin; 14 x 2 ranks are left, not the same number in each."""
    torch.manual_seed(1)
    model: Any = init_adapter(pico_base, METHOD.adapter, 9)
    train(model, examples("adalora"), METHOD, tmp_path / "checkpoints", Progress("t", 9, "steps"))
    save_adapter(model, tmp_path)
    singular = {name: tensor for name, tensor in published_state(model).items() if "lora_E" in name}
    ranks = [len(tensor) for tensor in singular.values()]
    assert len(ranks) == 14
    assert sum(ranks) == 14 * 2
    assert len(set(ranks)) > 1
    again: Any = load_adapted(pico_base, tmp_path, METHOD.adapter)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():  # in float32: ranks of zeros are left out, so that sums round otherwise
        logits, expected = (each.float().eval()(input_ids=ids).logits for each in (again, model))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_training_too_short_for_the_plan_is_refused(pico_base: Path) -> None:
    with pytest.raises(BadModel, match="no step in which to move ranks"):
        init_adapter(pico_base, METHOD.adapter, 4)
