"""The decoder in a model: the stack of layers that makes hidden states of token ids, whatever is wrapped around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from threading import Lock
from traceback import extract_tb
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from tasks.core.errors import BadModel
from tasks.core.memory import ran_out

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def unwrapped(model: PreTrainedModel | PeftModel) -> Any:
    """Return the model without what PEFT put around it; adapters stay within."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """Return the part of a model whose output its vocabulary head reads; None if there is no such part.

    What `get_decoder` finds by names is at times the model itself, or its head: then it is what most call `model`.
    """
    base = unwrapped(model)
    known = _decoders.get(base)
    if known and (decoder := known()) is not None:
        return decoder
    head = base.get_output_embeddings()
    for found in (base.get_decoder(), base.base_model, getattr(base, "model", None)):
        if found is not None and found is not base and found is not head and head not in found.modules():
            _decoders[base] = ref(found)
            return found  # type: ignore[no-any-return]
    return None


_decoders: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
"""Of each model that was asked about: finding out takes a walk over its modules, and every forward pass asks."""


@contextmanager
def forwards_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward passes of modules within the block and its thread; all else of them stays.

    Other threads' passes through the same modules are the modules' own.
    """
    with _replacing:
        for module in forwards:
            _blocks[module] = _blocks.get(module, 0) + 1
            if _blocks[module] == 1:
                module.forward = _by_thread(module, module.forward)
    within = _instead.set({**_instead.get(), **forwards})
    try:
        yield
    finally:
        _instead.reset(within)
        with _replacing:
            for module in forwards:
                _blocks[module] -= 1
                if not _blocks[module]:
                    del _blocks[module]
                    _restore(module, module.forward.__wrapped__)  # type: ignore[attr-defined]


_instead: ContextVar[Mapping[nn.Module, Callable[..., Any]]] = ContextVar(
    "forwards instead", default=MappingProxyType({})
)
_replacing = Lock()
_blocks: dict[nn.Module, int] = {}
"""How many blocks, of all threads, a module's forward pass is replaced in at present."""


def _by_thread(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)  # `generate` looks at the arguments of some
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _instead.get().get(module, own)(*args, **kwargs)

    return forward


def _restore(module: nn.Module, own: Callable[..., Any]) -> None:
    if getattr(own, "__func__", None) is type(module).forward:
        del module.forward
    else:  # what a library had put there
        module.forward = own


def made_up_tokens(base: nn.Module, *rows: Sequence[int]) -> Tensor:
    """Return rows of token ids to try a model with, (rows, tokens) int64, brought within its vocabulary."""
    import torch

    most = getattr(base.config.get_text_config(), "vocab_size", None)  # type: ignore[union-attr, operator]
    ids = torch.tensor(rows, device=next(base.parameters()).device)
    return ids % most if isinstance(most, int) else ids


@contextmanager
def own_code(base: Any) -> Iterator[None]:
    """Run a model's own code within the block, which may refuse text: for want of an image, or of rows of some length.

    Raises:
        BadModel: it does.
    """
    try:
        yield
    except Exception as error:
        if ran_out(error) or not _is_its_own(error):
            raise
        raise BadModel(
            "cannot be run on rows of text",
            where=type(base).__name__,
            got=f"{type(error).__name__}: {error}".split("\n")[0][:300],
            fix="choose a base that reads text alone, whatever its length",
        ) from error


def _is_its_own(error: Exception) -> bool:
    """Return whether an error was raised below the library's code, and by nothing of ours there."""
    files = [Path(frame.filename).parts for frame in extract_tb(error.__traceback__)]
    return any("transformers" in parts for parts in files) and "tasks" not in files[-1]
