"""Several adapters made into one update, against PEFT's own combinations of the same adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.errors import BadModel, BadParams
from tasks.merge.adapter_combination import Combination, combine, combined
from tasks.merge.merged_model import merge_changes, write_merged
from tests.tasks.deltas.test_weight_deltas import llama, perturbed, saved, written


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two adapters of it that change different layers."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("pair")
    base = saved(llama(), folder / "base")
    adapters = []
    for number, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "o_proj"])):
        torch.manual_seed(number)
        tuned = perturbed(get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, target_modules=targets)))
        adapters.append(saved(tuned, folder / f"adapter{number}"))
    return base, adapters


def both(base: Path, adapters: list[Path]) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    return model


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_combinations_are_those_of_peft(pair: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    """PEFT's are of a rank; at the full rank of 32 nothing is cut away."""
    base, adapters = pair
    how = Combination(method, (1.0, 0.5), 0.6, 32, 0)
    made = merge_changes(base, partial(combined, adapters, how), "own")
    write_merged(base, adapters[0], {tmp_path: made}, 1 << 30)
    peft = both(base, adapters)
    kind = "svd" if method == "svd" else "ties_svd"
    peft.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type=kind, svd_rank=32, density=0.6)
    peft.set_adapter("c")
    theirs = dict(peft.merge_and_unload(adapter_names=["c"]).named_parameters())
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(tensor, theirs[name].data, rtol=1e-4, atol=1e-5)


def test_a_linear_combination_is_the_weighted_sum(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    made = merge_changes(base, partial(combined, adapters, Combination("linear", (2.0, -1.0), 0.5, 1, 0)), "own")
    write_merged(base, adapters[0], {tmp_path: made}, 1 << 30)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    one, two = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)

    def update(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        a, b = (f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight" for part in "AB")
        return 2 * (tensors[b] @ tensors[a]) if a in tensors else torch.zeros(())

    for name, weight in before.items():
        torch.testing.assert_close(
            after[name], weight + 2 * update(one, name) - update(two, name), rtol=1e-5, atol=1e-6
        )


def test_svd_leaves_the_best_update_of_a_rank() -> None:
    """Eckart and Young: what is left out is the square root of the squares of the smaller singular values."""
    torch.manual_seed(0)
    update = torch.randn(12, 8)
    kept = combine([update], torch.tensor([1.0]), Combination("svd", (1.0,), 1.0, 3, 0))
    assert torch.linalg.matrix_rank(kept) == 3
    singular = torch.linalg.svdvals(update)
    torch.testing.assert_close((update - kept).norm(), singular[3:].norm(), rtol=1e-5, atol=1e-6)


def test_dare_drops_as_many_as_it_should_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    found = combine([torch.ones(200, 200)], torch.tensor([1.0]), Combination("dare_linear", (1.0,), 0.25, 1, 0))
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert abs((found > 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 40000) ** 0.5  # four standard deviations


def test_what_dare_drops_is_its_seed_s(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    files = []
    for number, seed in enumerate((1, 1, 2)):
        (out := tmp_path / str(number)).mkdir()
        how = Combination("dare_ties", (1.0, 1.0), 0.5, 1, seed)
        write_merged(base, adapters[0], {out: merge_changes(base, partial(combined, adapters, how), "own")}, 1 << 30)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


WRONG: dict[str, Callable[[Combination], Combination]] = {
    "no way to combine": lambda how: how._replace(method="mean"),
    "density is no share": lambda how: how._replace(density=0.0),
    "rank must be at least 1": lambda how: how._replace(rank=0),
    "a weight for each adapter": lambda how: how._replace(weights=(1.0,)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_combination_that_means_nothing_is_refused(what: str) -> None:
    with pytest.raises(BadParams, match=what):
        WRONG[what](Combination("ties", (1.0, 1.0), 0.5, 4, 0)).check(2)


def test_vocabularies_that_grow_are_not_combined(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    longer = written(tmp_path / "longer", {"base_model.model.model.embed_tokens.weight": torch.zeros(70, 32)})
    how = Combination("linear", (1.0, 1.0), 0.5, 1, 0)
    with pytest.raises(BadModel, match="change a vocabulary"):
        merge_changes(base, partial(combined, [adapters[0], longer], how), "own")
