"""Soft prompts, which are trained: embeddings before the first token, or keys and values that every layer attends to.

They are PEFT's (prompt tuning, P-tuning, prefix tuning); here is where a forward pass of our own puts them in.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from tasks.core.errors import BadModel
from tasks.models.device import upload

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_HANDLE = "_counts_only_what_is_attended"
"""Where a base keeps what takes the hook off it again."""


def virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    """Count the virtual tokens before each prompt; they take up room in the context. None while switched off."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning or model._adapters_disabled:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def with_virtual_tokens(model: PreTrainedModel | PeftModel, given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Put a model's virtual tokens before the tokens of a forward pass.

    Args:
        model: with or without virtual tokens.
        given: what the decoder is called with: input_ids and attention_mask, both (batch, tokens).

    Returns:
        The same with the virtual tokens, and how many positions of the output belong to them.
    """
    count = virtual_tokens(model)
    if not count:
        return given, 0
    ids, attended = given["input_ids"], given["attention_mask"]
    given = {**given, "attention_mask": torch.cat([attended.new_ones(len(ids), count), attended], dim=1)}
    numbers: dict[str, torch.Tensor] = model.prompt_tokens  # type: ignore[assignment]  # of the virtual tokens
    numbers.update({name: upload(each, ids.device) for name, each in numbers.items()})  # PEFT would in every pass
    prompt: Any = model.get_prompt(len(ids))  # type: ignore[operator]
    if not isinstance(prompt, torch.Tensor):  # keys and values: no position of their own
        return {**given, "past_key_values": prompt}, 0
    embedded = model.get_input_embeddings()(given.pop("input_ids"))
    return {**given, "inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], dim=1)}, count


def for_generation(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Return what `generate` is to be called of: with virtual tokens a form of the model for this one call.

    PEFT puts a method of its own on the base for as long as it generates, and takes it off again while another thread
    may still be generating. The form has the same modules and weights, and is a base and a wrapper of its own.
    """
    if not virtual_tokens(model):
        return model
    own = copy(model)
    own._modules = {**model._modules, "base_model": copy(model._modules["base_model"])}
    return own


def start_from_text(model: PeftModel, ids: list[int]) -> None:
    """Initialise a soft prompt from a text's embeddings, (virtual tokens, hidden); repeated or cut to its length.

    As in section 3.2 of arXiv:2104.08691.

    Raises:
        BadModel: the text has none.
    """
    if not ids:
        raise BadModel("its text has no tokens", where="adapter.text")
    weight = model.prompt_encoder["default"].embedding.weight
    repeated = torch.tensor([ids[n % len(ids)] for n in range(len(weight))], device=weight.device)
    with torch.no_grad():
        weight.copy_(model.get_input_embeddings()(repeated))


def count_only_what_is_attended(model: PeftModel) -> None:
    """Give tokens the positions that they have without padding, in whatever batch they are generated.

    PEFT puts soft prompts before the padding and drops the positions that count without it, so that a prompt would
    be the further from them the more padding its batch needs. `count_as_before` ends it.
    """
    base: Any = model.get_base_model()
    names = tuple(inspect.signature(base.forward).parameters)
    if "position_ids" not in names or _HANDLE in vars(base):
        return

    def with_positions(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        said = {**dict(zip(names, args, strict=False)), **given}
        read = next((said[name] for name in ("inputs_embeds", "input_ids") if said.get(name) is not None), None)
        mask = said.get("attention_mask")
        if read is None or said.get("position_ids") is not None or not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return args, given
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        return (), {**said, "position_ids": places[:, -read.shape[1] :]}

    setattr(base, _HANDLE, base.register_forward_pre_hook(with_positions, with_kwargs=True))


def count_as_before(base: PreTrainedModel) -> None:
    """Let a base whose soft prompt was removed count positions as it does without one."""
    if handle := vars(base).pop(_HANDLE, None):
        handle.remove()
