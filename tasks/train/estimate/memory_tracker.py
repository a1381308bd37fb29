"""A training step on tensors without numbers: what it would hold in memory, and how much work it would be.

The step is run by PyTorch itself, forwards, backwards and in the optimizer; only no kernel computes anything. So every
architecture, adapter and loss is counted as it is, temporary tensors too, and no formula has to be kept up with them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tasks.inference.linear_cross_entropy import observed
from tasks.inference.lm_head import head_of
from tasks.models.loader import Model
from tasks.train.estimate.meta_model import tensors_of

_ATEN = torch.ops.aten
_LEAST_IN_8_BITS = 4096
_BY_MASK = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN._index_put_impl_.default)


class MemoryPeak(NamedTuple):
    """Bytes: what each kind of tensor takes at most, and what all take together at most.

    The total can be less than the sum: while gradients are made, activations go. Activations are what is neither of
    the others: what the backward pass needs, and what lives for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    total: int


class Cost(NamedTuple):
    """Cost of a step: memory, arithmetic of its matrix products, and bytes that its operations read and write."""

    memory: MemoryPeak
    flops: int
    moved_bytes: int


class FakeOptimizerState(Optimizer):
    """Stands for an optimizer of bitsandbytes, or a fused one: it holds as much and does nothing.

    A state in 8 bits takes one byte a number, and four for the largest of each block of 256; tensors of fewer than 4096
    numbers keep states in 32 bits (arXiv:2110.02861, section 2 and appendix).
    """

    def __init__(self, groups: list[dict[str, Any]], states: int, bits: int) -> None:
        super().__init__(groups, {})
        self._states, self._bits = states, bits

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is never a closure
        """Create the optimizer states, the first time."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    continue
                small = self._bits == 8 and p.numel() >= _LEAST_IN_8_BITS
                for number in range(self._states):
                    dtype = torch.uint8 if small else torch.float32
                    self.state[p][f"state{number}"] = torch.zeros_like(p, dtype=dtype)
                    if small:
                        self.state[p][f"absmax{number}"] = p.new_zeros(-(-p.numel() // 256), dtype=torch.float32)


def dry_run_step(
    model: Model, losses: Callable[[], Iterable[tuple[Tensor, Any]]], optimizer: Optimizer, max_grad_norm: float
) -> Cost:
    """Measure what a step takes once optimizer states, and what is kept from epoch to epoch, are there.

    Args:
        model: a model whose tensors `meta_model.pretend` has made.
        losses: the parts of the step's loss on that model.
        optimizer: of the model's trainable parameters.
        max_grad_norm: what the gradient is scaled down to.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    ledger = MemoryTracker()
    for tensor in tensors_of(model):
        ledger.book(tensor, "weights")
    if model.config.is_encoder_decoder or head_of(model) is None:  # then the head is called as a module
        model.get_output_embeddings().register_forward_hook(lambda head, args, output: ledger.see_logits(output))
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.book(p.grad, "gradients"))
        parameter.grad = torch.zeros_like(parameter)
    with ledger, observed(ledger.see_logits):
        with torch.no_grad():
            next(iter(losses()))
        optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                ledger.book(value, "optimizer")
        optimizer.zero_grad(set_to_none=True)
        ledger.begin()
        for part, _ in losses():
            part.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
    return Cost(MemoryPeak(**ledger.most, total=ledger.most_together), ledger.flops, ledger.moved_bytes)


class MemoryTracker(TorchDispatchMode):
    """Books the memory of every tensor from its making to its end, and counts the work of every operation.

    Tensors with numbers may take part: those that say which tokens there are, and which of them are targets.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._now = dict.fromkeys(MemoryPeak._fields[:-1], 0)
        self._logits = 0
        self.begin()

    def begin(self) -> None:
        """Reset the counts; what is held stays booked."""
        self.most, self.most_together = dict(self._now), sum(self._now.values())
        self.flops = self.moved_bytes = 0

    def see_logits(self, logits: Tensor) -> None:
        """Record how many logits there are at once; a tensor of as many numbers belongs to the loss."""
        self._logits = logits.numel()
        self.book(logits, "logits")

    def book(self, tensor: Any, kind: str | None = None) -> None:
        """Book a tensor's storage, once; one that is booked already may turn out to be of another kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            if kind is None:
                return
            self._end(key)
        kind = kind or ("logits" if tensor.numel() == self._logits else "activations")
        self._held[key] = (weakref.ref(storage, lambda _: self._end(key)), kind, storage.nbytes())
        self._now[kind] += storage.nbytes()
        self.most[kind] = max(self.most[kind], self._now[kind])
        self.most_together = max(self.most_together, sum(self._now.values()))

    def _end(self, key: int) -> None:
        _, kind, size = self._held.pop(key)
        self._now[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a number to log
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            with self:
                return _gemm_4bit(*args, **(kwargs or {}))
        if func in _BY_MASK:
            args = (args[0], _places(args[1]), *args[2:])
        output = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.book(tensor)
        if not func.is_view:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved_bytes += sum(tensor.nbytes for tensor in (*given, *made))
        if formula := FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace masks by the places that they choose, whose number depends on what is in them."""
    places: list[Tensor | None] = []
    for index in indices:
        places += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return places


def _gemm_4bit(
    given: Tensor, packed: Tensor, shape: list[int], *_: Any, bias: Tensor | None = None, **__: Any
) -> Tensor:
    """Compute what bitsandbytes does with more than a few rows: dequantize the weight for the time of the product."""
    product = torch.mm(given.reshape(-1, shape[1]), given.new_empty(shape).t())
    return (product if bias is None else product.add_(bias)).reshape(*given.shape[:-1], shape[0])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Floating-point operations of matrix products by operation: PyTorch's own, and attention on a CPU, which it lacks."""
