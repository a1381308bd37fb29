"""The decoder in a model: the stack of layers that makes hidden states of token ids, whatever is wrapped around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from tasks.core.errors import BadModel
from tasks.core.memory import ran_out

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
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
    head = base.get_output_embeddings()
    for found in (base.get_decoder(), base.base_model, getattr(base, "model", None)):
        if found is not None and found is not base and found is not head and head not in found.modules():
            decoder: nn.Module = found
            return decoder
    return None


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
