"""Models in memory: a base, with or without an adapter, several adapters on one base, and their replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flows.chat import adapter_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.models.loader import Model


class HasModel(Protocol):
    """A model that `generate` can ask: a base, a trained adapter, or a pool of adapters."""

    @property
    def model(self) -> Model:
        """Return the model as it is now."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""


_Loaded = TypeVar("_Loaded")


class _loaded_once(cached_property[_Loaded]):  # noqa: N801  # a decorator, as what it extends
    """Property that the first thread computes that asks; others wait, which from Python 3.12 on they would not."""

    _loading = RLock()

    def __get__(self, instance: object, owner: type[Any] | None = None) -> _Loaded:  # type: ignore[override]
        with self._loading:
            return super().__get__(instance, owner)


@dataclass(frozen=True)
class Base:
    """A model folder, and an adapter on it if one was named.

    Attributes:
        folder: the model folder.
        adapter: the folder of a published adapter; None: none.
        any_base: whether the adapter may name another base.
    """

    folder: Path
    adapter: Path | None = None
    any_base: bool = False

    @_loaded_once
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the folder's tokenizer, with its chat template."""
        from tasks.tokenization.chat_template import load_tokenizer

        return load_tokenizer(self.folder)

    @_loaded_once
    def model(self) -> Model:
        """Return the model, ready to run; its weights are read when it is first asked for."""
        from tasks.adapters.attach import attach, load_packaged
        from tasks.models.loader import load_model

        if self.adapter is None:
            return load_packaged(self.folder)
        return attach(load_model(self.folder), self.adapter, any_base=self.any_base)


def load_model(folder: str | Path, *, adapter: str | Path | None = None, any_base: bool = False) -> Base:
    """Load a Hugging Face model folder, checked to be whole and safe; weights are read at the first reply.

    Args:
        folder: with config.json, safetensors and a tokenizer that has a chat template; or one that `merge` wrote.
        adapter: the folder of an adapter to put on it: one that `Adapter.save` wrote, or another of PEFT.
        any_base: also an adapter that names another base.

    Raises:
        BadModel: the folder is unsafe or incomplete, or its tokenizer cannot be used.
    """
    from tasks.adapters.package import base_in
    from tasks.core.artifacts import check_manifest
    from tasks.models.loader import model_files

    place = Path(folder).resolve()
    model_files(base_in(place))
    check_manifest(place)
    base = Base(place, Path(adapter).resolve() if adapter else None, any_base)
    _ = base.tokenizer  # so that a folder without a usable one is told now
    return base


class AdapterPool(adapter_pool.AdapterPool):
    """One base in memory with several adapters, of which one at most is in use: `load`, `use`, `off`, `merge`.

    Args:
        folder: the base's model folder.
    """

    def __init__(self, folder: str | Path) -> None:
        from tasks.models.loader import load_model as load_weights

        base = load_model(folder)
        super().__init__(load_weights(base.folder))
        self.tokenizer = base.tokenizer

    def load(self, name: str, folder: str | Path, *, any_base: bool = False) -> None:
        """Read an adapter and put it beside the base; what was in use stays in use.

        Raises:
            BadParams: the name is taken.
            BadModel: the adapter is damaged, unknown, of another base, does not fit, or changes the base itself.
        """
        super().load(name, Path(folder), any_base=any_base)


def generate(
    model: HasModel, prompt: str | Sequence[Mapping[str, str]], *, max_tokens: int = 128, **generation: Any
) -> str:
    """Generate a reply, with the edits or updates of the adapter that is on the model; in any number of threads.

    Args:
        model: a base, a trained adapter, or an adapter pool.
        prompt: what a user says, or a conversation of {role, content}; an encoder-decoder reads the last turn alone.
        max_tokens: tokens in the reply, at most.
        **generation: fields of `evaluate.generation` in docs/params.md: temperature, top_k, top_p,
            repetition_penalty, repetition_range, seed. Without any it is greedy.

    Raises:
        BadData: the prompt is no conversation.
        BadParams: an option is wrong.
    """
    from tasks.core.records import conversation
    from tasks.inference.chat import answer, answer_text
    from tasks.inference.params import generation_of
    from tasks.tokenization.architecture import ENCODER_DECODER, architecture_of

    how = generation_of(generation, "temper.generate")
    turns = conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    with model.in_use() if isinstance(model, AdapterPool) else nullcontext(model.model) as ready:
        if architecture_of(ready) is ENCODER_DECODER:
            return answer_text(ready, model.tokenizer, turns[-1].content, max_tokens, how).text
        return answer(ready, model.tokenizer, turns, max_tokens, how).text
