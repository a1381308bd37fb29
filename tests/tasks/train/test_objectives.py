from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.train.objectives import (
    hinge_loss,
    ipo_loss,
    kl_baseline,
    kto_loss,
    log_odds_ratio,
    orpo_loss,
    sft_loss,
    sigmoid_loss,
    simpo_loss,
    smoothed_loss,
)


def test_sft_is_the_mean_over_tokens() -> None:
    assert sft_loss(torch.tensor([-1.0, -2.0, -6.0])).item() == pytest.approx(3.0)


def test_smoothing_of_a_two_word_vocabulary_worked_out_by_hand() -> None:
    """p = 3/4 of the right word: targets 0.9 and 0.1 for a share of 0.2 on both, so -0.9 log 3/4 - 0.1 log 1/4."""
    right, wrong = math.log(0.75), math.log(0.25)
    loss = smoothed_loss(torch.tensor([right]), torch.tensor([(right + wrong) / 2]), smoothing=0.2)
    assert loss.item() == pytest.approx(-0.9 * right - 0.1 * wrong, rel=1e-6)


def test_dpo_of_one_pair_worked_out_by_hand() -> None:
    """The policy doubles the chosen reply's probability and halves the rejected one's: the margin is log 4.

    With beta 1/2 the odds are 2, so the loss is -log(2/3); smoothed by 1/10, -0.9 log(2/3) - 0.1 log(1/3). The hinge
    leaves 1 - log 2. IPO wants a margin of 1 / (2 beta) = 1.
    """
    margin = torch.tensor([math.log(2) - math.log(0.5)])
    assert sigmoid_loss(margin, beta=0.5, label_smoothing=0).item() == pytest.approx(math.log(1.5), rel=1e-6)
    smoothed = 0.9 * math.log(1.5) + 0.1 * math.log(3)
    assert sigmoid_loss(margin, beta=0.5, label_smoothing=0.1).item() == pytest.approx(smoothed, rel=1e-6)
    assert hinge_loss(margin, beta=0.5).item() == pytest.approx(1 - math.log(2), rel=1e-6)
    assert hinge_loss(margin, beta=2.0).item() == 0.0
    assert ipo_loss(margin, beta=0.5).item() == pytest.approx((math.log(4) - 1) ** 2, rel=1e-6)


def test_an_untrained_policy_has_the_losses_of_no_preference() -> None:
    none = torch.zeros(3)
    assert sigmoid_loss(none, beta=0.1, label_smoothing=0.2).item() == pytest.approx(math.log(2))
    assert hinge_loss(none, beta=0.1).item() == 1.0
    assert ipo_loss(none, beta=0.1).item() == pytest.approx(25.0)
    desirable, weights = torch.tensor([True, False, True]), {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert kto_loss(none, desirable, kl_baseline(none), beta=0.1, **weights).item() == pytest.approx(0.5)


def test_simpo_of_one_pair_worked_out_by_hand() -> None:
    """Per token 1/2 against 1/4, times beta 2, less gamma log 2: odds 4 / 2 = 2, so the loss is -log(2/3)."""
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    loss = simpo_loss(chosen, rejected, beta=2.0, gamma=math.log(2))
    assert loss.item() == pytest.approx(math.log(1.5), rel=1e-6)


def test_kto_of_two_replies_worked_out_by_hand() -> None:
    """Baseline log 2; a good reply that gained log 8 and a bad one that lost to 1/4, beta 1.

    Good: odds 8 / 2 = 4, so 1 - 4/5 is lost, with weight 2. Bad: odds 2 / (1/4) = 8, so 1 - 8/9 is lost.
    """
    ratio = torch.tensor([math.log(8), math.log(0.25)], requires_grad=True)
    baseline = kl_baseline(torch.tensor([math.log(4), 0.0]))
    assert baseline.item() == pytest.approx(math.log(2))
    loss = kto_loss(
        ratio, torch.tensor([True, False]), baseline, beta=1.0, desirable_weight=2.0, undesirable_weight=1.0
    )
    assert loss.item() == pytest.approx((2 / 5 + 1 / 9) / 2, rel=1e-6)
    loss.backward()
    assert ratio.grad is not None  # the slope of a sigmoid is s (1 - s), towards the good reply and away from the bad
    assert ratio.grad.tolist() == pytest.approx([-(2 * 4 / 25) / 2, (8 / 81) / 2], rel=1e-5)


def test_a_baseline_is_never_negative_and_has_no_gradient() -> None:
    ratio = torch.tensor([-3.0, -1.0], requires_grad=True)
    assert kl_baseline(ratio).item() == 0.0
    assert not kl_baseline(ratio + 5).requires_grad


@pytest.mark.parametrize("far", [0.0, 1e-3, 40.0, 1e4])
def test_losses_of_margins_are_finite_at_every_distance(far: float) -> None:
    for sign in (1, -1):
        margin = torch.tensor([sign * far], requires_grad=True)
        for loss in (
            sigmoid_loss(margin, beta=1.0, label_smoothing=0.1),
            hinge_loss(margin, beta=1.0),
            ipo_loss(margin, beta=1.0),
            simpo_loss(margin, torch.zeros(1), beta=1.0, gamma=1.0),
            kto_loss(
                margin,
                torch.tensor([True]),
                torch.tensor(0.0),
                beta=1.0,
                desirable_weight=1.0,
                undesirable_weight=1.0,
            ),
        ):
            (gradient,) = torch.autograd.grad(loss, margin)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()


def test_orpo_of_one_pair_worked_out_by_hand() -> None:
    """p = 1/2 against q = 1/4: odds 1 and 1/3, so the log odds ratio is log 3 and the penalty -log(3/4)."""
    terms = orpo_loss(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), torch.tensor(0.7), weight=0.1)
    ratio = log_odds_ratio(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]))
    assert ratio.item() == pytest.approx(math.log(3), rel=1e-6)
    assert terms.odds_penalty.item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert terms.loss.item() == pytest.approx(0.7 - 0.1 * math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-6, -0.1, -0.693, -0.694, -3.0, -50.0, -1e3])
@pytest.mark.parametrize("rejected", [0.0, -1e-12, -1e-6, -0.1, -3.0, -50.0, -1e3])
def test_orpo_is_finite_and_right_at_every_confidence(chosen: float, rejected: float) -> None:
    """Against float64 and the standard library; TRL's form gives NaN gradients from about -2e-8 upward."""
    c, r = (torch.tensor([value], requires_grad=True) for value in (chosen, rejected))
    terms = orpo_loss(c, r, torch.tensor(0.0), weight=1.0)
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert c.grad is not None
    assert r.grad is not None
    assert torch.isfinite(c.grad).all()
    assert torch.isfinite(r.grad).all()

    def log_odds(logp: float) -> float:
        logp = min(logp, -1e-12)
        return logp - math.log(-math.expm1(logp)) if logp > -700 else logp

    ratio = log_odds(chosen) - log_odds(rejected)
    expected = math.log1p(math.exp(-ratio)) if ratio > -700 else -ratio
    assert terms.loss.item() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_sft_against_transformers(pico_base: Path) -> None:
    """The loss that a Hugging Face model computes itself from labels, and its gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico_base, dtype=torch.float32)
    torch.manual_seed(1)
    rows = [torch.randint(5, 300, (n,)).tolist() for n in (9, 6, 12)]
    masks = [[i >= n // 2 for i in range(n)] for n in (9, 6, 12)]
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows])
    labels = torch.tensor(
        [
            [i if m else -100 for i, m in zip(r, k, strict=True)] + [-100] * (12 - len(r))
            for r, k in zip(rows, masks, strict=True)
        ]
    )
    theirs = model(input_ids=ids, attention_mask=attended, labels=labels).loss
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = sft_loss(score_tokens(model, [TokenRow(r, m, len(r) // 2) for r, m in zip(rows, masks, strict=True)]).logp)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
