"""What a model makes of padded rows, up to its vocabulary head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tasks.adapters.reft.prompt_positions import prompts_of
from tasks.core.errors import BadModel
from tasks.inference.agreement import holds
from tasks.inference.lm_head import takes_apart
from tasks.inference.prefix_sharing import padding_known
from tasks.inference.rope import alike, grouped, own_frequencies
from tasks.inference.turns import in_turn
from tasks.models.decoder import decoder_of, made_up_tokens, own_code, unwrapped
from tasks.models.device import upload
from tasks.models.loader import Model


def states_of(model: Model, given: dict[str, Any], lengths: Sequence[int]) -> Tensor:
    """Compute the hidden states that the head reads, (rows, tokens, hidden), or logits if the model is run as a whole.

    A row's do not depend on the rows beside it: where padding or the longest row would change it, the batch is split.

    Args:
        model: a decoder, with or without an adapter.
        given: what it is called with; rows are padded on the right, and `attention_mask`, (rows, tokens), says where.
        lengths: how many tokens of each row it attends to, as that mask says.

    Raises:
        BadModel: the model's own code refuses these rows.
    """
    base = unwrapped(model)
    groups = together(base, lengths)
    if len(groups) == 1:
        return _run_padded(base, given, lengths)
    if given.get("past_key_values") is not None:
        raise BadModel(
            "rows of different lengths cannot be computed together on this model, nor behind keys and values",
            where=type(base).__name__,
            fix="choose another adapter than a trained prefix",
        )
    width, prompts, parts = max(lengths), prompts_of(base), list[Tensor]()
    for group in groups:
        rows, longest = torch.tensor(group), max(lengths[row] for row in group)
        own = {name: _of_rows(value, upload(rows, base.device), longest) for name, value in given.items()}
        with prompts.among(rows) if prompts else nullcontext():
            states = _run_padded(base, own, [lengths[row] for row in group])
            parts.append(torch.nn.functional.pad(states, (0, 0, 0, width - longest)))
    order = torch.tensor([row for group in groups for row in group]).argsort()
    return torch.cat(parts).index_select(0, upload(order, base.device))


def together(base: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Group rows of these lengths in tokens so that none is changed by the others; numbers in their order."""
    takes_apart(base)  # is known from here on, also where parts of the model are replaced for a while
    if min(lengths) == max(lengths) or pads(base):
        return alike(base.config, lengths)
    return grouped(lengths)


def pads(base: Any) -> bool:
    """Return whether a row gives the same with padding on its right: some models look there, or count it in."""

    def padded_and_alone() -> Iterator[tuple[Tensor, Tensor]]:
        ids = made_up_tokens(base, [1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0])
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        both = _run(base, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
        own = {"input_ids": ids[1:, :4], "attention_mask": mask[1:, :4], "use_cache": False}
        yield both[1, :4], _run(base, own)[0]

    return holds(base, "it can be padded on the right", padded_and_alone)


def _run_padded(base: Any, given: dict[str, Any], lengths: Sequence[int]) -> Tensor:
    mask = given.get("attention_mask")
    with padding_known(base, padded=mask is not None and min(lengths) < mask.shape[1]):
        return _run(base, given)


def _run(base: Any, given: dict[str, Any]) -> Tensor:
    """Run the decoder, or all of a model that does not come apart."""
    decoder: Any = decoder_of(base) if takes_apart(base) else None
    with own_code(base), in_turn(base), own_frequencies(base):
        found: Tensor = base(**given).logits if decoder is None else decoder(**given).last_hidden_state
    return found


def _of_rows(value: Any, rows: Tensor, longest: int) -> Any:
    return value[rows, :longest] if isinstance(value, Tensor) and value.dim() > 1 else value
