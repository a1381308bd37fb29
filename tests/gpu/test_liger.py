"""The head by Liger's kernel against the plain way in float64; skipped where there is no GPU or no liger-kernel."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from tasks.inference.linear_cross_entropy import Head, score_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed"),
]


@pytest.mark.parametrize("form", [{}, {"scale": 0.25}, {"cap": 5.0}, {"bias": True}], ids=str)
def test_log_probabilities_and_gradients_are_the_plain_ones(form: dict[str, float]) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    hidden = torch.randn(70, 32, device=device, requires_grad=True)
    weight = torch.randn(300, 32, device=device, requires_grad=True)
    bias = torch.randn(300, device=device) if form.get("bias") else None
    targets, upstream = torch.randint(0, 300, (70,), device=device), torch.randn(70, device=device)
    scale, cap = form.get("scale", 1.0), form.get("cap")
    head = Head(weight, bias, scale, cap)

    logits = hidden.double() @ weight.double().t()
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = -F.cross_entropy(logits, targets, reduction="none")
    found = score_targets(hidden, head, targets).logp
    assert (found - expected).abs().max() < 1e-4
    of_expected = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    of_found = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
    for mine, other in zip(of_found, of_expected, strict=True):
        assert (mine - other).norm() < 1e-4 * other.norm()
