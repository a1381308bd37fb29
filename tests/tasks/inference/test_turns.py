"""Passes of several threads through one model give what each gives alone, whatever is on the model.

Two passes are taken in step: every module is entered by both before either goes on, so that what one of them keeps on
the model the other one finds there for certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.adapters.attach import make_trainable
from tasks.inference.agreement import holds
from tasks.inference.continuations import continuations
from tasks.inference.encoder_decoder import PairRow, generate_targets, score_pairs
from tasks.inference.logprobs import find_out, score_tokens
from tasks.inference.params import GREEDY, Generation
from tasks.inference.rows import TokenRow
from tasks.inference.turns import in_step, in_turn, passes_side_by_side
from tasks.models.decoder import forwards_instead
from tasks.models.loader import load_model
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import SFT, method
from tests.tasks.adapters.test_attach import ADAPTERS, trained
from tests.tasks.inference.test_rope import model_of

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [30, 31, 32])
DRAWN = Generation.model_validate({**GREEDY.model_dump(), "temperature": 1.0, "seed": 3})
NO_END: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def writing(model: Any, prompt: list[int], tokens: int, how: Generation = GREEDY) -> Callable[[], Any]:
    return lambda: continuations(model, NO_END, [prompt], tokens, how)


def scoring(model: Any, prompt: list[int]) -> Callable[[], list[float]]:
    row = TokenRow([*prompt, 20, 21, 22], [False] * len(prompt) + [True] * 3, len(prompt))
    return lambda: score_tokens(model, [row]).logp.tolist()


def running(model: Any, prompt: list[int]) -> Callable[[], Any]:
    ids = torch.tensor([prompt])
    return lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist()


def check_in_step(model: Any, *passes: Callable[[], Any]) -> None:
    with torch.no_grad():
        alone = [each() for each in passes]
    assert alone[0] != alone[1]
    for given, own in zip(in_step(model, passes), alone, strict=True):
        assert given == pytest.approx(own, abs=1e-5) if isinstance(own[0], float) else given == own


@pytest.mark.parametrize("name", [*(name for name in ADAPTERS if ADAPTERS[name].name != "full"), "none"])
def test_two_passes_in_step_give_what_each_gives_alone(pico_base: Path, name: str) -> None:
    """The first one ends while the second still writes, and each draws by its own seed."""
    model = load_model(pico_base) if name == "none" else trained(pico_base, name).requires_grad_(False)
    find_out(model)
    assert passes_side_by_side(model)
    check_in_step(model, *(running(model, prompt) for prompt in PROMPTS))
    check_in_step(model, *(scoring(model, prompt) for prompt in PROMPTS))
    check_in_step(model, *(writing(model, *each) for each in zip(PROMPTS, (2, 8), strict=True)))
    check_in_step(model, writing(model, PROMPTS[0], 3, DRAWN), writing(model, PROMPTS[0], 5, GREEDY))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_follow_the_longest_row_do_not_follow_another_threads(rope: str) -> None:
    model = model_of(rope)
    find_out(model)
    assert passes_side_by_side(model)
    prompts = [[3 + n % 50 for n in range(length)] for length in (30, 7)]
    check_in_step(model, *(scoring(model, prompt) for prompt in prompts))
    check_in_step(model, *(writing(model, prompt, 6) for prompt in prompts))


@pytest.mark.parametrize("adapter", [None, "prompt_tuning", "loreft"])
def test_an_encoder_decoder_too(tmp_path: Path, adapter: str | None) -> None:
    model: Any = load_model(
        make_base(tmp_path / "t5", "t5", ["some words to be read", "and others to be written"] * 20)
    )
    if adapter:
        torch.manual_seed(0)
        model = make_trainable(model, ADAPTERS[adapter]).requires_grad_(False).eval()
    assert passes_side_by_side(model)
    prompts = ([5, 6, 7, 8, 9, 10, 11], [12, 3, 4])
    check_in_step(
        model,
        *(lambda p=p: score_pairs(model, [PairRow(p, [8, 4, 6])]).logp.tolist() for p in prompts),
    )
    check_in_step(
        model,
        *(
            lambda p=p, n=n: generate_targets(model, NO_END, [p], n, DRAWN)
            for p, n in zip(prompts, (2, 6), strict=True)
        ),
    )


def test_a_method_that_keeps_a_pass_on_its_modules_is_run_in_turn(pico_base: Path) -> None:
    """Layers of PEFT's Shadow hand a state on by attributes."""
    torch.manual_seed(0)
    adapter = method({"name": "peft", "method": "SHADOW", "config": {}}, SFT).adapter
    model: Any = make_trainable(load_model(pico_base), adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.requires_grad_(False).eval()
    wanted = [writing(model, prompt, 6)() for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda prompt: writing(model, prompt, 6)(), PROMPTS * 4))
    assert given == wanted * 4
    assert not passes_side_by_side(model)


class Counting(nn.Module):
    """Counts the tokens of a pass on itself, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.part, self.seen = nn.Parameter(torch.zeros(1)), nn.Identity(), 0
        self.inside = 0
        self.most_inside = 0

    def forward(self, tokens: int, entered: Event, go_on: Event) -> int:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.seen = tokens
        entered.set()
        go_on.wait(5)
        self.inside -= 1
        return self.seen


def test_a_pass_waits_while_another_is_under_way_and_nothing_is_known_of_them() -> None:
    model: Any = Counting()  # cannot generate, so that nothing can be shown of it
    entered, go_on, done = Event(), Event(), Event()
    done.set()

    def first() -> int:
        with in_turn(model):
            return int(model(1, entered, go_on))

    def second() -> int:
        with in_turn(model):
            return int(model(2, Event(), done))

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert entered.wait(5)
        other = pool.submit(second)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        go_on.set()
        assert (one.result(5), other.result(5)) == (1, 2)
    assert model.most_inside == 1


def test_forward_passes_are_replaced_for_one_thread_alone() -> None:
    model = nn.Linear(2, 2)
    given, zero = torch.ones(1, 2), torch.zeros(1, 2)
    own = model(given)
    with ThreadPoolExecutor(1) as other:
        with forwards_instead({model: lambda _: zero}):
            assert torch.equal(model(given), zero)
            with forwards_instead({model: lambda _: given}):
                assert torch.equal(model(given), given)
            assert torch.equal(model(given), zero)
            assert torch.equal(other.submit(model, given).result(), own)
        assert torch.equal(model(given), own)
        assert "forward" not in vars(model)


def test_what_another_thread_finds_out_is_waited_for() -> None:
    base, entered, go_on = nn.Linear(2, 2), Event(), Event()
    looks: list[int] = []

    def compare() -> Iterator[tuple[Tensor, Tensor]]:
        looks.append(1)
        entered.set()
        go_on.wait(5)
        yield torch.ones(1, 2), torch.ones(1, 2)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(holds, base, "it is so", compare)
        assert entered.wait(5)
        other = pool.submit(holds, base, "it is so", compare)
        with pytest.raises(TimeoutError):
            other.result(0.2)
        go_on.set()
        assert one.result(5)
        assert other.result(5)
    assert len(looks) == 1
