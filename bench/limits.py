"""Models of a known shape, what a step on them must compute, how fast and in how much memory the machine does it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A Llama, and rows for it: (prompt, reply) tokens at most."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {"tiny": Shape(192, 512, 4, 3, 3, 8192), "135M": Shape(576, 1536, 30, 9, 3, 49152)}
"""The second is SmolLM-135M's."""


def write_base(folder: Path, shape: Shape, dtype: Any) -> None:
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


class Needed(NamedTuple):
    """Tokens that must be computed: each prompt once, no padding; and those of them that are scored."""

    tokens: int
    scored: int
    pairs_attended: int


def useful_flops(model: Any, needed: Needed) -> float:
    """4 operations a frozen weight and token, 6 a trained one; the head on scored tokens alone; causal attention."""
    config, head = model.config, model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not head]
    frozen = sum(p.numel() for p in matrices if not p.requires_grad)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    attention = 3 * 4 * config.num_hidden_layers * config.hidden_size * needed.pairs_attended
    flops: float = (4 * frozen + 6 * trained) * needed.tokens + 4 * head.numel() * needed.scored + attention
    return flops


def peak_flops(model: Any) -> float:
    """The best rate of the model's own products on 512 tokens, operations a second, median of five."""
    import torch
    from torch.nn import functional as F

    rates = []
    for shape in {tuple(p.shape) for p in model.parameters() if p.ndim == 2 and not p.requires_grad}:
        weight, given = (torch.randn(size, dtype=model.dtype) for size in (shape, (512, shape[1])))
        F.linear(given, weight)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            F.linear(given, weight)
            times.append(time.perf_counter() - started)
        rates.append(2 * 512 * weight.numel() / statistics.median(times))
    return max(rates)


def peak_bytes(work: Callable[[], object]) -> int:
    """What PyTorch holds at most during some work, beyond what it held before."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    todo, blocks = list(profiled.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            blocks.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(blocks):
        held += size
        most = max(most, held)
    return most


def attended(prompt: int, replies: Sequence[int]) -> int:
    """Pairs of a token and one that it attends to, each prompt counted once."""
    trunk = prompt * (prompt + 1) // 2
    return trunk + sum(reply * prompt + reply * (reply + 1) // 2 for reply in replies)
