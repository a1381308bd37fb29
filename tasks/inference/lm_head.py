"""Vocabulary heads: how a model makes logits of hidden states.

Most models multiply hidden states by one matrix, some then scale or cap the logits. A model's form is found by its
own forward pass, run once on stand-ins for everything but the part after its layers. Where the head is not one plain
matrix, or something else is done, that same part of the forward pass makes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tasks.inference.linear_cross_entropy import Head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def head_of(model: PreTrainedModel | PeftModel) -> Head | None:
    """Return the model's vocabulary head, if it is one plain matrix whose output is at most scaled and capped."""
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return None
    if base not in _forms:
        _forms[base] = _form_of(base)
    form = _forms[base]
    return Head(head.weight, head.bias, form.scale, form.cap) if form else None


def logits_of(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """Compute the logits, (tokens, vocabulary), by the model's own forward pass, of hidden states, (tokens, hidden)."""
    base = unwrapped(model)
    with _instead(base, {base.get_decoder(): _Layers(hidden[None])}):
        logits: Tensor = _after_layers(base, len(hidden), hidden.device)
    return logits[0]


# --- what comes after the head ----------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """Form of the logits, made of the head's output z: scale z, then cap tanh(z / cap)."""

    scale: float
    cap: float | None

    def of(self, output: Tensor) -> Tensor:
        scaled = output * self.scale
        return scaled if self.cap is None else (scaled / self.cap).tanh() * self.cap


_forms: WeakKeyDictionary[nn.Module, _Form | None] = WeakKeyDictionary()
"""Of each model that was asked about: finding out takes a walk over its modules."""

_PROBES = 32


def _form_of(base: Any) -> _Form | None:
    """Find how logits follow from the head's output; None if the model does something else, before the head or after.

    The head gets known hidden states to compare, and gives known numbers of which the model's own code makes logits.
    """
    hidden = torch.linspace(-1, 1, base.get_output_embeddings().weight.shape[1], dtype=torch.float64)[None, None]
    output = torch.linspace(-100, 100, _PROBES, dtype=torch.float64)[None, None]
    head = _Numbers(output)
    try:
        with torch.no_grad(), _instead(base, {base.get_decoder(): _Layers(hidden), base.get_output_embeddings(): head}):
            logits = _after_layers(base, 1, torch.device("cpu")).double()
    except Exception:  # stand-ins do not do for this model's code, whatever it is that fails: its real parts will
        return None
    if len(head.seen) != 1 or not torch.equal(head.seen[0], hidden) or logits.shape != output.shape:
        return None
    config = base.config.get_text_config().to_dict()
    cap = config.get("final_logit_softcapping")
    one = torch.atanh(logits / cap) * cap if cap else logits
    least = output.abs().argmin()  # where nothing is capped
    scale = float(one.flatten()[least] / output.flatten()[least])
    form = _Form(1.0 if abs(scale - 1) < 1e-6 else scale, cap)
    return form if torch.allclose(form.of(output), logits, rtol=1e-5, atol=1e-8) else None


def _after_layers(base: Any, tokens: int, device: torch.device) -> Tensor:
    """Compute the logits of the model's forward pass, whose hooks are those of a whole one and stay out of this."""
    logits: Tensor = base.forward(
        input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=False
    ).logits
    return logits


class _Layers(nn.Module):
    """Stands for all that comes before the head: gives the hidden states that it was told to."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._output = _Output(hidden)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return self._output


class _Output:
    """Output of a stack of layers, with hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


class _Numbers(nn.Module):
    """Stands for the head: gives the numbers that it was told to, and keeps what it was given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output
        self.seen: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden)
        return self._output


@contextmanager
def _instead(base: nn.Module, others: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """Replace modules by others within the block."""
    places = [(module, name) for module in base.modules() for name, child in module._modules.items() if child in others]
    before = [module._modules[name] for module, name in places]
    try:
        for (module, name), child in zip(places, before, strict=True):
            module._modules[name] = others[child]  # type: ignore[index]
        yield
    finally:
        for (module, name), child in zip(places, before, strict=True):
            module._modules[name] = child


def unwrapped(model: PreTrainedModel | PeftModel) -> Any:
    """Return the model without what PEFT put around it; adapters stay within."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
