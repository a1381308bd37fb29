"""Cache of activations that no adapter can change: the same in every epoch, they are computed once.

Layers below the first one that an adapter changes see nothing that is trained. With ReFT, where only tokens at the end
of the prompt are edited, what stands before those is the same in all layers, so that the layers above need no more of
it than its keys and values. Both are computed for a row alone, so that they depend neither on its batch nor on when a
training was interrupted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from tasks.adapters.hooks import body_of, layers_of
from tasks.adapters.positions import parse_positions
from tasks.adapters.reft.prompt_positions import prompts_of
from tasks.adapters.reft.tuner import ReftConfig, ReftLayer
from tasks.inference.agreement import is_true
from tasks.inference.prefix_sharing import padding_known, unpack_rows
from tasks.inference.rope import own_frequencies
from tasks.models.decoder import forwards_instead, made_up_tokens
from tasks.models.device import upload


class CachedPrefix(NamedTuple):
    """Part of a forward pass that some rows can leave out.

    Attributes:
        start: how many tokens at the beginning of each row need not be given.
        cache: their keys and values, padded on the left; None if there are none.
        attended: 1 for each of them, 0 for that padding, (rows, longest) int64.
    """

    start: list[int]
    cache: Any
    attended: Tensor


class CachedState(NamedTuple):
    """Cached activations of a row.

    Attributes:
        hidden: hidden states at the cut, (tokens, hidden).
        attention: keys and values of the layers above it, (layers, 2, heads, tokens, width).
    """

    hidden: Tensor
    attention: Tensor | None


class FrozenLayerCache:
    """Keeps what lies below the first layer that is changed, and before the first edited token."""

    def __init__(self, body: nn.Module, layers: Sequence[nn.Module], cut: int, last: int, prompts: Any) -> None:
        """Prepare to keep the output of layer number `cut` - 1; `last` tokens of each prompt are edited, 0: more."""
        self._body, self._layers, self._cut, self._last, self._prompts = body, layers, cut, last, prompts
        self._states: dict[bytes, CachedState] = {}
        self._token_bytes = (0, 0)

    @classmethod
    def of(cls, model: Any, rows: Sequence[tuple[int, int]], max_bytes: int) -> FrozenLayerCache | None:
        """Build the cache for a model with an adapter and rows given as (tokens, prompt tokens).

        Where keys and values would need more than `max_bytes`, hidden states alone are kept. None where those are too
        many too, or would be wrong: no layer below the first that is changed, dropout in one, trained tokens or
        embeddings, an encoder.
        """
        config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", ""))
        if config is None or config.is_prompt_learning or model.config.is_encoder_decoder:
            return None
        base = model.get_base_model()
        try:
            layers = list(layers_of(base).values())
        except ValueError:  # ReFT has told of that before
            return None
        cut = _first_changed(base, layers)
        if isinstance(config, ReftConfig):
            cut += config.component == "block_output"
        shares = getattr(base.config.get_text_config(), "num_kv_shared_layers", 0)  # layers that are passed over, too
        if cut == 0 or shares or _drops(base, layers[cut:]):
            return None
        below = cls(body_of(base), layers, cut, 0, prompts_of(base))
        if isinstance(config, ReftConfig) and not _slides(base.config) and not _drops(base, []):
            spans = parse_positions(config.positions)
            below._last = 0 if spans.first or spans.all else spans.last
        for last in (below._last, 0):
            below._last = last
            state = below._one([0, 1, 2, 3], 4)
            if state is None:
                continue
            token = state.hidden[0].nbytes
            before = state.attention[:, :, :, 0].nbytes if state.attention is not None else 0
            below._token_bytes = (token, before)
            if below.kept_bytes(rows) <= max_bytes and is_true(base, partial(below._with_and_without, model)):
                return below
        return None

    def _with_and_without(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute what scored tokens of two rows follow from, with what is kept of them and without."""
        from tasks.inference.logprobs import score_tokens
        from tasks.inference.rows import TokenRow

        given = [made_up_tokens(model, row)[0].tolist() for row in ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11])]
        rows = [
            TokenRow(ids, [at >= prompt for at in range(len(ids))], prompt)
            for ids, prompt in zip(given, (4, 2), strict=True)
        ]
        try:
            with unpack_rows():
                yield score_tokens(model, rows, self).logp[:, None], score_tokens(model, rows).logp[:, None]
        finally:
            self._states.clear()

    def kept_bytes(self, rows: Sequence[tuple[int, int]]) -> int:
        """Count the bytes that are kept of rows given as (tokens, prompt tokens)."""
        token, before = self._token_bytes
        starts = [self._start(prompt) for _, prompt in rows]
        return sum(tokens for tokens, _ in rows) * token + sum(starts) * (before - token)

    @contextmanager
    def known(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> Iterator[CachedPrefix]:
        """Around a forward pass of rows of token ids with prompts of such lengths; they are padded on the right."""
        states = [self._state(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
        start = [self._start(prompt) for prompt in prompts]
        hidden = nn.utils.rnn.pad_sequence([state.hidden for state in states], batch_first=True)
        *passed, last = self._layers[: self._cut]
        with forwards_instead({**dict.fromkeys(passed, _unchanged), last: partial(_given, hidden)}):
            yield CachedPrefix(start, *self._cached([state.attention for state in states], start, hidden.device))

    def _cached(self, states: list[Tensor | None], start: list[int], device: torch.device) -> tuple[Any, Tensor]:
        from transformers import DynamicCache

        longest = max(start)
        attended = upload([[0] * (longest - size) + [1] * size for size in start], device)
        if not longest or self._cut == len(self._layers):  # no layer is left that would look back
            return None, attended
        every = torch.stack([pad(state, (0, 0, longest - state.shape[3], 0)) for state in states if state is not None])
        cache, nothing = DynamicCache(), every.new_zeros(len(start), 1, longest, 1)
        for number in range(len(self._layers)):  # of layers that are passed over no more is asked than the length
            above = number - self._cut
            cache.update(*((every[:, above, 0], every[:, above, 1]) if above >= 0 else (nothing, nothing)), number)
        return cache, attended

    def _start(self, prompt: int) -> int:
        return prompt - min((prompt + 1) // 2, self._last) if self._last else 0

    def _state(self, row: Sequence[int], prompt: int) -> CachedState:
        key = array("q", [prompt, *row]).tobytes()
        if key not in self._states:
            state = self._one(row, prompt)
            if state is None:
                raise AssertionError("a layer gave a tensor before, and now something else")
            self._states[key] = state
        return self._states[key]

    @torch.no_grad()
    def _one(self, row: Sequence[int], prompt: int) -> CachedState | None:
        """Compute what a row alone gives, without edits; None if the layers give more than a tensor each."""
        found: list[Any] = []
        start, ids = self._start(prompt), upload([list(row)], next(self._body.parameters()).device)

        def take(layer: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            if not self._last:
                raise _Enough

        handle = self._layers[self._cut - 1].register_forward_hook(take, prepend=True)
        cache = None
        try:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": self._last > 0}
            untouched = self._prompts.nowhere() if self._prompts else nullcontext()
            with untouched, own_frequencies(self._body), padding_known(self._body, padded=False):
                cache = getattr(self._body(**given), "past_key_values", None)
        except _Enough:
            pass
        finally:
            handle.remove()
        if not isinstance(found[0], Tensor) or found[0].dim() != 3 or (self._last and not hasattr(cache, "layers")):
            return None
        hidden = found[0][0, start:].clone()
        if cache is None:
            return CachedState(hidden, None)
        above = [cache.layers[number] for number in range(self._cut, len(self._layers))]
        kept = [torch.stack([layer.keys[0, :, :start], layer.values[0, :, :start]]) for layer in above]
        return CachedState(hidden, torch.stack(kept) if kept else None)


def _first_changed(base: Any, layers: Sequence[nn.Module]) -> int:
    """Return the number of the first layer that an adapter changes; 0 where anything else but the head changes, too."""

    def changes(part: nn.Module) -> bool:
        return isinstance(part, BaseTunerLayer | ReftLayer) or any(p.requires_grad for p in part.parameters(False))

    changed = {part for part in base.modules() if changes(part)}
    first = next((number for number, layer in enumerate(layers) if changed & set(layer.modules())), 0)
    behind = {part for each in (*layers, base.get_output_embeddings()) for part in each.modules()}
    return 0 if changed - behind else first


class _Enough(Exception):  # no error
    """Ends a forward pass of which nothing more is wanted."""


def _drops(base: Any, above: Sequence[nn.Module]) -> bool:
    """Return whether dropout is active anywhere but in the edits and in the layers `above`."""
    edits = [part for part in base.modules() if isinstance(part, ReftLayer)]
    passed_over = {id(part) for each in (*above, *edits) for part in each.modules()}
    parts = (part for part in base.modules() if id(part) not in passed_over)
    config = base.config.get_text_config()
    by_functions = any(getattr(config, name, 0) for name in ("dropout", "attention_dropout", "activation_dropout"))
    return by_functions or any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts)


def _slides(config: Any) -> bool:
    """Return whether a layer attends to a sliding window alone."""
    kinds = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "sliding_window", None)) or any(kind != "full_attention" for kind in kinds)


def _unchanged(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _given(states: Tensor, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return states
