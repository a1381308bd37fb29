"""The head's tiles against plain PyTorch: all logits at once, a log-softmax, and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.inference import linear_cross_entropy as tiles
from tasks.inference.linear_cross_entropy import Head, observed, product_dtype, score_targets

FORMS: list[dict[str, Any]] = [{}, {"scale": 0.0625}, {"cap": 3.0}, {"scale": 1.7, "cap": 5.0}]
IDS = ["plain", "scaled", "capped", "both"]
TOKENS, HIDDEN, VOCABULARY = 37, 24, 131


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles either way, the last of each smaller than the others."""
    monkeypatch.setattr(tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(tiles, "TILE_VOCABULARY", 50)


class Case:
    """Random tensors, all of which learn."""

    def __init__(self, dtype: torch.dtype, *, bias: bool = True, spread: float = 1.0) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
        self.weight = (torch.randn(VOCABULARY, HIDDEN) * spread).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
        self.targets = torch.randint(0, VOCABULARY, (TOKENS,))
        self.learns = [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def plain(self, scale: float = 1.0, cap: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and means from logits as a whole."""
        logits = F.linear(self.hidden, self.weight, self.bias) * scale
        logits = logits if cap is None else (logits / cap).tanh() * cap
        logp = F.log_softmax(logits, 1)
        return logp.gather(1, self.targets[:, None])[:, 0], logp.mean(1)

    def gradients(self, logp: Tensor, mean: Tensor | None) -> list[Tensor]:
        """Of a loss that is linear neither in the log-probabilities nor in the means."""
        loss = (logp.exp() * torch.arange(TOKENS)).sum() + (logp**2).mean()
        loss = loss if mean is None else loss - (mean**3).mean()
        return list(torch.autograd.grad(loss, self.learns))


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_the_plain_ones_to_ten_digits(
    form: dict[str, Any], bias: bool, with_mean: bool
) -> None:
    case = Case(torch.float64, bias=bias)
    found = score_targets(case.hidden, Head(case.weight, case.bias, **form), case.targets, with_mean=with_mean)
    logp, mean = case.plain(**form)
    torch.testing.assert_close(found.logp, logp, rtol=1e-10, atol=1e-10)
    if with_mean:
        torch.testing.assert_close(found.mean_logp, mean, rtol=1e-10, atol=1e-10)
    else:
        assert found.mean_logp is None
    ours = case.gradients(found.logp, found.mean_logp)
    for mine, other in zip(ours, case.gradients(logp, mean if with_mean else None), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_gradients_are_finite_differences(form: dict[str, Any]) -> None:
    case = Case(torch.float64)

    def scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        found = score_targets(hidden[:5], Head(weight, bias, **form), case.targets[:5], with_mean=True)
        return [score for score in found if score is not None]

    assert torch.autograd.gradcheck(scores, case.learns, fast_mode=True)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_in_float32_they_agree_to_five_digits(form: dict[str, Any]) -> None:
    case = Case(torch.float32)
    found = score_targets(case.hidden, Head(case.weight, case.bias, **form), case.targets, with_mean=True)
    assert found.logp.dtype == torch.float32
    logp, mean = case.plain(**form)
    torch.testing.assert_close(found.logp, logp, rtol=1e-5, atol=1e-5)
    for mine, other in zip(case.gradients(*found[:2]), case.gradients(logp, mean), strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_bf16_is_as_near_to_the_truth_as_the_plain_way() -> None:
    case, exact = Case(torch.bfloat16, bias=False), Case(torch.float64, bias=False)
    with torch.no_grad():
        for rounded, whole in zip(case.learns, exact.learns, strict=True):
            whole.copy_(rounded)
    found = score_targets(case.hidden, Head(case.weight), case.targets)
    plain = -F.cross_entropy(F.linear(case.hidden, case.weight).float(), case.targets, reduction="none")
    truth, _ = exact.plain()
    assert found.logp.dtype == torch.float32
    assert (found.logp - truth).norm() <= 1.1 * (plain - truth).norm()
    gradients = exact.gradients(truth, None)
    ours, theirs = case.gradients(found.logp, None), case.gradients(plain, None)
    for mine, other, true in zip(ours, theirs, gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() <= 1.1 * (other - true).norm()


def test_only_what_learns_gets_a_gradient_and_without_one_nothing_is_kept() -> None:
    case = Case(torch.float32)
    frozen = Head(case.weight.detach(), None)
    logp = score_targets(case.hidden, frozen, case.targets).logp
    logp.sum().backward()
    assert case.hidden.grad is not None
    assert not any(t.grad is not None for t in case.learns[1:])
    trained = score_targets(case.hidden.detach(), Head(case.weight), case.targets).logp
    trained.sum().backward()
    assert case.learns[1].grad is not None
    with torch.no_grad():
        alone = score_targets(case.hidden, frozen, case.targets).logp
    assert alone.grad_fn is None
    assert torch.equal(alone, logp)


def test_of_no_tokens_there_are_no_scores_and_gradients_of_zero() -> None:
    case = Case(torch.float32)
    found = score_targets(case.hidden[:0], Head(case.weight), case.targets[:0]).logp
    assert found.shape == (0,)
    found.sum().backward()
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


@pytest.mark.parametrize("spread", [0.0, 1e-3, 50.0])
def test_logits_far_apart_or_all_alike_stay_right(spread: float) -> None:
    case = Case(torch.float64, bias=False, spread=spread)
    found = score_targets(case.hidden, Head(case.weight), case.targets).logp
    torch.testing.assert_close(found, case.plain()[0], rtol=1e-10, atol=1e-10)


def test_a_forbidden_token_has_no_probability_and_does_no_harm() -> None:
    """A bias of minus infinity, even on a whole tile of the vocabulary, which comes first."""
    case = Case(torch.float64)
    bias = torch.zeros(VOCABULARY, dtype=torch.float64)
    bias[:60] = -torch.inf
    targets = case.targets.clamp(min=60)
    found = score_targets(case.hidden, Head(case.weight, bias), targets).logp
    logits = F.linear(case.hidden, case.weight, bias)
    torch.testing.assert_close(found, -F.cross_entropy(logits, targets, reduction="none"), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), case.hidden)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_the_likeliest_token_is_the_first_of_the_largest_logits(form: dict[str, Any]) -> None:
    """Every token in turn, of logits in which three columns in two tiles tie, and of others."""
    case = Case(torch.float64, bias=False)
    with torch.no_grad():
        case.weight[40] = case.weight[20] = case.weight[90] = 3 * case.hidden[:10].mean(0)
        best = (F.linear(case.hidden, case.weight) * form.get("scale", 1.0)).argmax(1)
        for token in (20, 40, 90, *best.unique().tolist()):
            found = score_targets(
                case.hidden, Head(case.weight, **form), torch.full((TOKENS,), token), with_likeliest=True
            )
            assert torch.equal(found.likeliest, best == token)  # type: ignore[arg-type]
    assert (best == 20).any()
    assert not (best == 40).any()
    assert score_targets(case.hidden, Head(case.weight), case.targets).likeliest is None


def test_what_is_not_finite_is_not_hidden() -> None:
    case = Case(torch.float32)
    with torch.no_grad():
        case.hidden[3, 0] = torch.nan
    found = score_targets(case.hidden, Head(case.weight), case.targets).logp
    assert found.isnan().nonzero().tolist() == [[3]]


def test_twice_the_same_bits() -> None:
    def once() -> list[Tensor]:
        case = Case(torch.float32)
        found = score_targets(case.hidden, Head(case.weight, case.bias), case.targets, with_mean=True)
        return case.gradients(*found[:2])

    assert all(torch.equal(one, other) for one, other in zip(once(), once(), strict=True))


def test_what_is_held_at_once_is_a_tile_whatever_the_vocabulary() -> None:
    largest: list[int] = []
    for vocabulary in (100, 1000):
        hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
        with observed(lambda tile: largest.append(tile.numel())):
            score_targets(hidden, Head(weight), torch.zeros(40, dtype=torch.long)).logp.sum().backward()
    assert max(largest) == 16 * 50


def test_products_are_in_the_type_of_the_weights_or_of_autocast_where_the_machine_has_a_unit_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, half = Case(torch.float32), Case(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for unit, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {"amx_bf16": unit})
        assert product_dtype(half.hidden, Head(half.weight)) == expected
        assert product_dtype(case.hidden, Head(case.weight)) == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert product_dtype(case.hidden, Head(case.weight)) == expected
            found = score_targets(case.hidden, Head(case.weight, case.bias), case.targets)
        torch.testing.assert_close(found.logp, case.plain()[0], rtol=0.02, atol=0.05)
        for mine, other in zip(case.gradients(found.logp, None), case.gradients(case.plain()[0], None), strict=True):
            assert mine.dtype == torch.float32
            assert (mine - other).norm() <= 0.05 * other.norm()


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """What PyTorch allocates forwards and backwards, by its own profiler; the plain way holds all logits, twice."""
    from bench.limits import peak_bytes

    def most(vocabulary: int, *, plain: bool = False) -> int:
        hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(vocabulary, 16)
        targets = torch.zeros(64, dtype=torch.long)

        def work() -> None:
            if plain:
                F.cross_entropy(F.linear(hidden, weight), targets).backward()
            else:
                score_targets(hidden, Head(weight), targets).logp.mean().backward()

        return peak_bytes(work)

    assert most(20_000) == most(2_000) < 40_000
    assert most(20_000, plain=True) > 2 * 64 * 20_000 * 4
