"""Positions of the prompts of a batch, which edits of prompt tokens need, found without the caller's help.

In training labels show it: a prompt ends where the first target token stands. While a model generates, the prompt is
what the first forward pass sees, and nothing is a prompt once there is a cache. Padding on either side is no part of
it, and rows packed one after another, which begin where `position_ids` are 0, have a prompt each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tasks.adapters.pass_state import PassState
from tasks.adapters.positions import Spans, parse_positions
from tasks.models.device import host_read, upload

IGNORED = -100
"""The label of tokens that are no targets."""


class Segments(NamedTuple):
    """The prompts of a batch, (prompts,) int64 each, on the host: the row it stands in, its first column, its length.

    How many tokens there are to edit depends on these numbers: on a GPU every edit would have to wait for them.
    """

    row: Tensor
    start: Tensor
    length: Tensor


LAST_ALONE = parse_positions("last")

_NONE = Segments(torch.empty(0), torch.empty(0), torch.empty(0))

Places = tuple[Tensor, Tensor]
"""Rows and columns of single tokens, (tokens,) int64 each."""


def places(prompts: Segments, spans: Spans) -> dict[str, Places]:
    """Compute the tokens of each span.

    Where a prompt of p tokens is short, pyreft's rule holds (`get_intervention_locations`, 0.1.0): at most floor(p / 2)
    of its tokens are first ones, and at most as many last ones. So the two never meet, and the middle one of an odd
    number is neither. The last token alone is that of any prompt (`make_last_position_supervised_data_module`).
    """
    if spans.all:
        return {"all": _from(prompts, prompts.start, prompts.length)}
    found, half = {}, prompts.length // 2
    if spans.first:
        found["first"] = _from(prompts, prompts.start, half.clamp(max=spans.first))
    if spans.last:
        count = half.clamp(max=spans.last) if spans != LAST_ALONE else prompts.length.clamp(max=1)
        found["last"] = _from(prompts, prompts.start + prompts.length - count, count)
    return found


def _from(prompts: Segments, start: Tensor, count: Tensor) -> Places:
    """Take the `count` tokens from `start` on, prompt after prompt."""
    which = torch.repeat_interleave(torch.arange(len(count)), count)
    before = count.cumsum(0) - count
    offset = torch.arange(len(which)) - before[which]
    return prompts.row[which], start[which] + offset


class _Pass(PassState):
    """Prompts of a forward pass: those that it has, and what was said of them before it."""

    def __init__(self) -> None:
        self.prompts: Segments | None = None
        self.places: dict[tuple[Spans, torch.device, str | None], dict[str, Places]] = {}
        self.labels: Tensor | None = None
        self.given: Segments | None = None
        self.owners: Sequence[str | None] | None = None


class Prompts:
    """Follows a model's forward passes, and knows where the prompts of this thread's present one are."""

    def __init__(self) -> None:
        """Begin without a forward pass."""
        self.rests = False
        """Whether nobody asks for prompts for now."""
        self._pass = _Pass()
        self._handles: list[Any] = []
        self._seen: Any = WeakIdKeyDictionary()

    def follow(self, model: nn.Module, body: nn.Module) -> None:
        """Watch a model, and the part of it whose layers are edited."""
        self._handles = [
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            model.register_forward_hook(self._drop_labels, always_call=True),
            body.register_forward_pre_hook(self._find, with_kwargs=True),
        ]

    def recall_within(self, layer: nn.Module) -> None:
        """Give a checkpointed layer its prompts again when the backward pass runs it a second time.

        Its own hooks stay outside that second run; those of what it is made of do not. Which run of the layer it
        repeats is identified by its input, which is the same tensor.
        """
        self._handles.append(layer.register_forward_pre_hook(self._remember))
        for part in layer.modules():
            if part is not layer:
                self._handles.append(part.register_forward_pre_hook(self._recall, with_kwargs=True))

    def leave(self) -> None:
        """Stop watching the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def given(self, lengths: Tensor, start: Tensor | None = None) -> Iterator[None]:
        """Make row i's prompt its first `lengths[i]` tokens within this block, (rows,) int64 on the host.

        The first `start[i]` of these may be left out of what the model is given, and its own cache stand for them.
        """
        row = torch.arange(len(lengths))
        with self.at(row, torch.zeros_like(row) if start is None else -start, lengths):
            yield

    @contextmanager
    def at(
        self, row: Tensor, start: Tensor, length: Tensor, *, owners: Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Set the prompts for this block, (prompts,) int64 each, on the host; a row may hold several.

        Args:
            row: the row that each stands in.
            start: its first column.
            length: how many tokens it has.
            owners: the adapter of each prompt, where passes are of several (`tasks.adapters.mixed_batch`).
        """
        self._pass.given, self._pass.owners = Segments(row, start, length), owners
        try:
            yield
        finally:
            self._pass.given = self._pass.owners = None

    @contextmanager
    def among(self, rows: Tensor) -> Iterator[None]:
        """Keep within this block the prompts set before that are in these rows, (rows,) int64 on the host."""
        before = self._pass.given
        if before is not None and before is not _NONE:
            inside = torch.isin(before.row, rows)
            place = (before.row[inside, None] == rows).int().argmax(1)
            self._pass.given = Segments(place, before.start[inside], before.length[inside])
        try:
            yield
        finally:
            self._pass.given = before

    @contextmanager
    def nowhere(self) -> Iterator[None]:
        """Declare that there are no prompts within this block, so that nothing is edited."""
        before, self._pass.given = self._pass.given, _NONE
        try:
            yield
        finally:
            self._pass.given = before

    def places(self, spans: Spans, device: torch.device, owner: str | None = None) -> dict[str, Places]:
        """Return the tokens to edit in the present forward pass, on a device; empty while it goes on from a cache.

        Args:
            spans: which of a prompt's.
            device: where they are wanted.
            owner: those of the prompts of an adapter, where these are told apart; None: of all.
        """
        present = self._pass
        if present.prompts is None:
            return {}
        asked = (spans, device, owner)
        if asked not in present.places:
            prompts = present.prompts
            if owner is not None and present.owners is not None:
                own = torch.tensor([each == owner for each in present.owners])
                prompts = Segments(*(each[own] for each in prompts))
            found = places(prompts, spans)
            present.places[asked] = {
                name: (upload(rows, device), upload(columns, device)) for name, (rows, columns) in found.items()
            }
        return present.places[asked]

    def _remember(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(layer, "gradient_checkpointing", False) and layer.training and args:
            self._seen[args[0]] = (self._pass.prompts, self._pass.places)

    def _recall(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen and torch._C._current_graph_task_id() != -1:  # within a backward pass
            given = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            if given is not None and given in self._seen:
                self._pass.prompts, self._pass.places = self._seen[given]

    def _take_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass.labels = None if getattr(model.config, "is_encoder_decoder", False) else kwargs.get("labels")

    def _drop_labels(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pass.labels = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass.places = {}
        if self.rests:
            self._pass.prompts = None
            return
        cache = kwargs.get("past_key_values")
        if self._pass.given is not None:
            self._pass.prompts = None if self._pass.given is _NONE else self._pass.given
        elif cache is not None and cache.get_seq_length() > 0:
            self._pass.prompts = None
        else:
            given = args[0] if args else kwargs.get("input_ids")
            tokens = kwargs["inputs_embeds"] if given is None else given
            if self._pass.labels is None and torch.is_grad_enabled() and body.training and _learns(body):
                warnings.warn("ReFT trains without labels: every token is taken for a prompt's", stacklevel=2)
            valid, packed = _valid(tokens, kwargs.get("attention_mask")), _packed(kwargs)
            with host_read("where prompts end, once a pass, unless whoever runs the model has said it"):
                labels, packed = (each if each is None else each.cpu() for each in (self._pass.labels, packed))
                self._pass.prompts = find_positions(valid.cpu(), labels, packed)


def _learns(body: nn.Module) -> bool:
    return not getattr(getattr(body, "config", None), "is_encoder_decoder", False)


def _packed(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Position ids that tell where packed rows begin: those that come without a mask."""
    return kwargs.get("position_ids") if kwargs.get("attention_mask") is None else None


def _valid(tokens: Tensor, mask: Any) -> Tensor:
    """Find the tokens that are no padding, (rows, columns); of a mask of four dimensions its last row decides."""
    rows, columns = tokens.shape[:2]
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None:
        return torch.ones(rows, columns, dtype=torch.bool, device=tokens.device)
    if mask.dim() == 4:
        mask = mask[:, 0, columns - 1, :columns]
        mask = mask if mask.dtype == torch.bool else mask >= 0
    valid: Tensor = mask[:, :columns].bool().expand(rows, columns)
    return valid


def find_positions(valid: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Segments:
    """Find the prompts of a batch, all tensors (rows, columns) on the host.

    Args:
        valid: which tokens are no padding.
        labels: target tokens; all else is `IGNORED`. A row without target tokens is all prompt.
        position_ids: for packed rows, which begin where they are 0.
    """
    columns = torch.arange(valid.shape[1]).expand(valid.shape)
    begins = valid & (valid.cumsum(1) == 1)
    if position_ids is not None:
        begins = begins | (valid & (position_ids.expand(valid.shape) == 0))
    row, start = begins.nonzero(as_tuple=True)
    segment = begins.flatten().cumsum(0).reshape(valid.shape) - 1
    end = torch.zeros_like(start).scatter_reduce(0, segment[valid], columns[valid] + 1, "amax")
    if labels is not None:
        targets = valid & (labels != IGNORED)
        end = end.scatter_reduce(0, segment[targets], columns[targets], "amin")
    return Segments(row, start, end - start)


def prompts_of(model: nn.Module) -> Prompts | None:
    """Return the tracker of the prompts of a model with edits; None for one without."""
    found = next((vars(module)["reft_prompts"] for module in model.modules() if "reft_prompts" in vars(module)), None)
    return found if isinstance(found, Prompts) else None


@contextmanager
def untouched(base: nn.Module) -> Iterator[None]:
    """Leave a model as it was, after a block without gradients, dropout or edits of prompts."""
    training = [module for module in base.modules() if module.training]
    prompts = prompts_of(base)
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), prompts.nowhere() if prompts else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
