"""Objectives on a model, against the same worked out another way on the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.adapters.attach import init_adapter
from tasks.inference.rows import TokenRow
from tasks.models.loader import Model
from tasks.train.examples import Example
from tests.helpers.samples import DPO, KTO, LORA, ORPO, SFT, SIMPO, method
from tests.helpers.training import loss_of

PAIRS = {"orpo": ORPO, "dpo": DPO, "simpo": SIMPO}


def row(prompt: list[int], reply: list[int], desirable: bool = True) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt), desirable)


def pairs() -> list[Example]:
    """Four pairs; the first two share a prompt."""
    torch.manual_seed(4)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 300, (length,)).tolist()

    prompts = [ids(6), ids(3), ids(9)]
    sizes = [(0, 4, 2), (0, 3, 5), (1, 2, 6), (2, 7, 3)]
    return [(row(prompts[p], ids(c)), row(prompts[p], ids(r))) for p, c, r in sizes]


@pytest.fixture
def model(pico_base: Path) -> Model:
    """A LoRA that is not at its beginning, in float32."""
    made = init_adapter(pico_base, method(LORA, SFT).adapter).float()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def reply_logps(model: Any, rows: list[TokenRow], *, left: bool) -> list[Tensor]:
    """Log-probabilities of each row's reply tokens, by one forward pass of transformers' with padding on a side."""
    longest = max(row.tokens for row in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return [fill] * (longest - len(values)) + values if left else values + [fill] * (longest - len(values))

    ids = torch.tensor([padded(list(row.ids), 7) for row in rows])
    attended = torch.tensor([padded([1] * row.tokens, 0) for row in rows])
    places = (attended.cumsum(1) - 1).clamp(min=0)
    logps = model(input_ids=ids, attention_mask=attended, position_ids=places).logits.log_softmax(-1)
    found = []
    for n, each in enumerate(rows):
        begin = longest - each.tokens if left else 0
        where = torch.arange(begin + each.prompt_tokens, begin + each.tokens)
        found.append(logps[n, where - 1, ids[n, where]])
    return found


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def by_hand(model: Any, examples: list[Example], name: str, *, left: bool) -> Tensor:
    rows = [example[i] for i in (0, 1) for example in examples]
    logps = reply_logps(model, rows, left=left)  # type: ignore[arg-type]
    means, sums = (torch.stack([getattr(each, of)() for each in logps]) for of in ("mean", "sum"))
    (chosen, rejected), count = means.chunk(2), len(examples)
    if name == "orpo":
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        return (-chosen - 0.1 * F.logsigmoid(odds)).mean()
    if name == "simpo":
        return -F.logsigmoid(2.0 * (chosen - rejected - 0.5 / 2.0)).mean()
    with torch.no_grad(), model.disable_adapter():
        base = torch.stack([each.sum() for each in reply_logps(model, rows, left=left)])  # type: ignore[arg-type]
    gain = sums - base
    return -F.logsigmoid(0.1 * (gain[:count] - gain[count:])).mean()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", PAIRS)
def test_padding_on_either_side_gives_the_loss_and_the_gradients(model: Model, name: str, left: bool) -> None:
    """ORPO's is LLaMA-Factory's form (`odds_ratio_loss` of its DPO trainer): the mean of -chosen per pair and token."""
    loss, _ = loss_of(model, pairs(), method(LORA, PAIRS[name]))
    expected = by_hand(model, pairs(), name, left=left)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_with_the_same_prompt_are_as_pairs_alone(model: Model, name: str) -> None:
    params = method(LORA, PAIRS[name])
    together, _ = loss_of(model, pairs()[:2], params)
    alone = torch.stack([loss_of(model, [pair], params)[0] for pair in pairs()[:2]]).mean()
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    for one, other in zip(gradients(model, together), gradients(model, alone), strict=True):
        assert (one - other).norm() < 2e-5 * other.norm()


def test_smoothed_targets_are_those_of_pytorch_and_transformers(model: Any) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    rows = [pair[0] for pair in pairs() if isinstance(pair[0], TokenRow)]
    loss, logged = loss_of(model, [(each,) for each in rows], method(LORA, {**SFT, "label_smoothing": 0.2}))
    longest = max(each.tokens for each in rows)
    ids = torch.tensor([[*each.ids, *[0] * (longest - each.tokens)] for each in rows])
    trained = torch.tensor([[*each.mask, *[False] * (longest - each.tokens)] for each in rows])
    labels = ids.masked_fill(~trained, -100)
    logits = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    pytorchs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.2)
    theirs: Any = LabelSmoother(epsilon=0.2)({"logits": logits}, labels.clone(), shift_labels=True)
    assert loss.item() == pytest.approx(pytorchs.item(), rel=1e-5)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    plain, _ = loss_of(model, [(each,) for each in rows], method(LORA, SFT))
    assert logged["nll"] == pytest.approx(plain.item(), rel=1e-6)
    for ours, expected in zip(gradients(model, loss), gradients(model, pytorchs), strict=True):
        assert (ours - expected).norm() < 2e-5 * expected.norm()


def test_a_lone_reply_has_no_baseline(model: Model) -> None:
    """There is no other row of the step to take a mismatched reply from."""
    reply = pairs()[0][0]
    assert isinstance(reply, TokenRow)
    for desirable, reward in ((True, "reward_chosen"), (False, "reward_rejected")):
        loss, logged = loss_of(model, [(reply._replace(desirable=desirable),)], method(LORA, KTO))
        gain = logged[reward] if desirable else -logged[reward]
        assert loss.item() == pytest.approx(1 - torch.sigmoid(torch.tensor(gain)).item(), rel=1e-5)
        assert logged["baseline"] == 0.0
        assert "margin" not in logged
