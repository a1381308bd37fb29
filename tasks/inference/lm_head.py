"""Vocabulary heads: how a model makes logits of hidden states.

Most models multiply hidden states by one matrix, some then scale or cap the logits. A model's form is found by its
own forward pass, run once on stand-ins for everything but the part after its layers. Where the head is not one plain
matrix, or something else is done, that same part of the forward pass makes the logits. That decoder and head together
give what the whole forward pass gives is proved on a few tokens; a model of which it is not true is run as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tasks.core.errors import BadModel
from tasks.inference.agreement import holds, turn_of
from tasks.inference.linear_cross_entropy import Head, scaled_and_capped
from tasks.models.decoder import decoder_of, forwards_instead, made_up_tokens, own_code, unwrapped
from tasks.models.device import host_read

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def takes_apart(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether the model's decoder and then its head give the logits of the model's own forward pass.

    Raises:
        BadModel: it is no decoder: what it says of a token depends on those behind it.
    """
    base = unwrapped(model)
    if not holds(base, "it looks back alone", partial(_before_several_endings, base)):
        raise BadModel(
            "looks ahead, so that it is no model of what comes next",
            where=type(base).__name__,
            expected="a decoder",
            fix='a model of BERT\'s kind is one with "is_decoder": true in its config.json, and trained as one',
        )
    decoder = decoder_of(base)
    if decoder is None or base.get_output_embeddings() is None:
        return False

    def both_ways() -> Iterator[tuple[Tensor, Tensor]]:
        ids = made_up_tokens(base, range(1, 7))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        yield logits_of(base, decoder(**given).last_hidden_state[0]), base.forward(**given).logits[0]

    return holds(base, "it can be taken apart", both_ways)


def _before_several_endings(base: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the logits of five tokens, with a sixth behind them, with another one, and with none."""
    given = made_up_tokens(base, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7])
    rows = [*given, given[0, :5]]
    with own_code(base):
        one, other, none = (base.forward(input_ids=row[None], use_cache=False).logits[0, :5] for row in rows)
    yield one, other
    yield one, none


def head_of(model: PreTrainedModel | PeftModel) -> Head | None:
    """Return the model's vocabulary head, if it is one plain matrix whose output is at most scaled and capped."""
    base = unwrapped(model)
    head = base.get_output_embeddings()
    with turn_of(base):  # another thread may have something else for this head while it finds out its form
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            return None
        if base not in _forms:
            _forms[base] = _form_of(base)
        form = _forms[base]
    return Head(head.weight, head.bias, form.scale, form.cap) if form else None


def logits_of(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """Compute the logits, (tokens, vocabulary), by the model's own forward pass, of hidden states, (tokens, hidden)."""
    base = unwrapped(model)
    with forwards_instead({_decoder(base): lambda *_, **__: _Output(hidden[None])}):
        logits: Tensor = _after_layers(base, len(hidden), hidden.device)
    return logits[0]


def _decoder(base: Any) -> nn.Module:
    decoder = decoder_of(base)
    if decoder is None:
        raise TypeError(f"{type(base).__name__} has no decoder apart from its head")
    return decoder


# --- what comes after the head ----------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """Form of the logits, made of the head's output z: scale z, then cap tanh(z / cap)."""

    scale: float
    cap: float | None

    def of(self, output: Tensor) -> Tensor:
        return scaled_and_capped(output, self.scale, self.cap)


_forms: WeakKeyDictionary[nn.Module, _Form | None] = WeakKeyDictionary()
"""Of each model that was asked about: finding out takes a walk over its modules."""

_PROBES = 32


def _form_of(base: Any) -> _Form | None:
    """Find how logits follow from the head's output; None if the model does something else, before the head or after.

    The head gets known hidden states to compare, and gives known numbers of which the model's own code makes logits.
    """
    weight = base.get_output_embeddings().weight
    where: Any = {"dtype": torch.float64, "device": weight.device}
    hidden = torch.linspace(-1, 1, weight.shape[1], **where)[None, None]
    output = torch.linspace(-100, 100, _PROBES, **where)[None, None]
    seen: list[Tensor] = []

    def head(states: Tensor) -> Tensor:
        seen.append(states)
        return output

    layers = lambda *_, **__: _Output(hidden)  # noqa: E731
    try:
        with torch.no_grad(), forwards_instead({_decoder(base): layers, base.get_output_embeddings(): head}):
            logits = _after_layers(base, 1, weight.device).double()
    except Exception:  # stand-ins do not do for this model's code, whatever it is that fails: its real parts will
        return None
    with host_read("the form of the head, once for a model"):
        logits, hidden, output, *seen = (each.cpu() for each in (logits, hidden, output, *seen))
    if len(seen) != 1 or not torch.equal(seen[0], hidden) or logits.shape != output.shape:
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


class _Output:
    """Output of a stack of layers, with hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None
