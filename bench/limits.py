"""Models of a known shape, and how much memory work on them holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A Llama; `tied`: its head is its embedding."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True


SHAPES = {
    "tiny": Shape(192, 512, 4, 3, 3, 8192),
    "135M": Shape(576, 1536, 30, 9, 3, 49_152),
    "1.1B": Shape(2048, 5632, 22, 32, 4, 32_000, tied=False),
    "8B": Shape(4096, 14_336, 32, 32, 8, 128_256, tied=False),
}
"""All but the first are those of SmolLM-135M, TinyLlama-1.1B and Llama-3-8B."""


def config_of(shape: Shape) -> Any:
    """Return the configuration of a Llama of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=16384,
        tie_word_embeddings=shape.tied,
    )


def write_base(folder: Path, shape: Shape, dtype: Any) -> None:
    """Write a Llama with random weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(config_of(shape)).to(dtype).save_pretrained(folder)


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the most memory that PyTorch holds during some work, beyond what it held before."""
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
