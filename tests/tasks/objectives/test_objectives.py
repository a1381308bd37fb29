from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.models import TokenRow, score_tokens
from tasks.objectives.orpo import orpo_loss
from tasks.objectives.sft import sft_loss


def test_sft_is_the_mean_over_tokens() -> None:
    assert sft_loss(torch.tensor([-1.0, -2.0, -6.0])).item() == pytest.approx(3.0)


def test_orpo_of_one_pair_worked_out_by_hand() -> None:
    """p = 1/2 against q = 1/4: odds 1 and 1/3, so the log odds ratio is log 3 and the penalty -log(3/4)."""
    terms = orpo_loss(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), torch.tensor(0.7), weight=0.1)
    assert terms.log_odds_ratio.item() == pytest.approx(math.log(3), rel=1e-6)
    assert terms.odds_penalty.item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert terms.loss.item() == pytest.approx(0.7 - 0.1 * math.log(0.75), rel=1e-6)
    assert terms.accuracy.item() == 1.0


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


def trl_orpo_trainer(base: Path, tmp_path: Path) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    arguments = ORPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        beta=0.1,
        report_to=[],
        max_length=64,
        gradient_checkpointing=False,
    )
    return ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def test_orpo_against_trl(pico_base: Path, tmp_path: Path) -> None:
    """TRL's own loss and gradients on the same token ids, in float32, within 1e-5.

    TRL takes the likelihood term over prompt and reply; ours is over the reply alone, so it is given TRL's for the sum.
    """
    trainer = trl_orpo_trainer(pico_base, tmp_path)
    model = trainer.model
    torch.manual_seed(0)
    prompts = [torch.randint(5, 300, (n,)).tolist() for n in (4, 7, 5)]
    chosen = [torch.randint(5, 300, (n,)).tolist() for n in (3, 5, 2)]
    rejected = [torch.randint(5, 300, (n,)).tolist() for n in (6, 2, 4)]

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    batch: dict[str, Any] = {}
    for name, replies in (("chosen", chosen), ("rejected", rejected)):
        rows = [p + r for p, r in zip(prompts, replies, strict=True)]
        batch[f"{name}_input_ids"] = padded(rows, 0)
        batch[f"{name}_attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        batch[f"{name}_labels"] = padded([[-100] * len(p) + r for p, r in zip(prompts, replies, strict=True)], -100)
    theirs, logged = trainer.get_batch_loss_metrics(model, batch, train_eval="train")
    model.zero_grad()
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def row(prompt: list[int], reply: list[int]) -> TokenRow:
        return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt))

    pairs = [row(p, r) for p, r in zip(prompts * 2, chosen + rejected, strict=True)]
    means = score_tokens(model, pairs).row_means()
    whole = [TokenRow(p + r, [False] + [True] * (len(p + r) - 1), 1) for p, r in zip(prompts, chosen, strict=True)]
    terms = orpo_loss(means[:3], means[3:], sft_loss(score_tokens(model, whole).logp), weight=0.1)
    model.zero_grad()
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert terms.log_odds_ratio.item() == pytest.approx(float(logged["log_odds_chosen"]), abs=1e-6)  # of numbers near 6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], rtol=1e-4, atol=1e-6)


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
