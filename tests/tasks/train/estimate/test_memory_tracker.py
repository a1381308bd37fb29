"""Rehearsed steps against real ones.

Real memory is read off PyTorch's profiler, which is told of every block that PyTorch allocates and frees, inside of
kernels too: exact, and the same on every machine. What a process has resident is checked as well, with a C library
that gives freed blocks back at once: as glibc is set up, it keeps most of those under 32 MiB, and so shows more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.limits import peak_bytes
from tasks.adapters.attach import init_adapter
from tasks.core.progress import Progress
from tasks.engine.memory import recompute_activations
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.device import compute_dtype
from tasks.train.estimate.estimate import estimate, full_rows
from tasks.train.estimate.memory_tracker import Cost, dry_run_step
from tasks.train.estimate.meta_model import count, meta_model, read_model_config, tensors_of, to_fake_tensors
from tasks.train.examples import Example
from tasks.train.objectives import sft_loss
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.samples import DPO, IA3, KTO, LEARNT_PROMPTS, LORA, LORA_8_BIT, LOREFT, ORPO, QLORA, SFT, method
from tests.helpers.training import loss_of, train
from tests.tasks.train.estimate.test_meta_model import LLAMA_2_7B

CPU = torch.device("cpu")
SMALL = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=8192,
)
"""Small, but with 512 tokens in a row activations and logits are by far the most."""
DORA = {**LORA, "name": "dora"}
BOTTLENECK = {
    "name": "bottleneck",
    "form": "houlsby",
    "reduction_factor": 8.0,
    "non_linearity": "relu",
    "scaling": 1.0,
    "layers": "all",
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(SMALL).to(compute_dtype()).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture: fused projections, dropout, tied embeddings."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=3000)
    GPT2LMHeadModel(config).to(compute_dtype()).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def rows(count: int, longest: int, replies: int = 1) -> list[Example]:
    """Rows that get shorter and shorter, half of each a prompt."""
    lengths = [longest - 16 * n for n in range(count)]
    made = [TokenRow(list(range(5, 5 + n)), [False] * (n // 2) + [True] * (n - n // 2), n // 2) for n in lengths]
    return [(row,) * replies for row in made]


def held_bytes(model: Any) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("adapter", "objective", "changes"),
    [
        (QLORA, SFT, {}),
        (LORA, SFT, {}),
        (DORA, SFT, {}),
        (LOREFT, SFT, {"epochs": 2}),
        ({**LOREFT, "positions": "f2+l3", "layers": [5]}, SFT, {"epochs": 2, "batch_size": 4}),
        (BOTTLENECK, SFT, {}),
        (QLORA, ORPO, {"batch_size": 1}),
        ({**LORA, "dropout": 0.1}, SFT, {}),
        (IA3, SFT, {}),
        (LORA, {**SFT, "label_smoothing": 0.1, "neftune_alpha": 5.0}, {}),
        (LORA, DPO, {"batch_size": 1}),
        (LORA, {**KTO, "reference": "precomputed"}, {}),
        (LORA_8_BIT, SFT, {}),
        (LEARNT_PROMPTS["prompt_tuning"], SFT, {}),
        (LEARNT_PROMPTS["prefix"], SFT, {}),
    ],
    ids=[
        "qlora",
        "lora",
        "dora",
        "reft",
        "reft-both-ends",
        "bottleneck",
        "orpo",
        "dropout",
        "ia3",
        "smoothed",
        "dpo",
        "kto",
        "lora8bit",
        "prompt_tuning",
        "prefix",
    ],
)
def test_the_estimated_memory_is_that_of_a_real_training(
    small_base: Path, tmp_path: Path, adapter: dict[str, Any], objective: dict[str, Any], changes: dict[str, Any]
) -> None:
    params = method(adapter, objective, **{"batch_size": 2, **changes})
    given = rows(4, 512, 2 if objective in (ORPO, DPO) else 1)
    estimated = estimate(read_model_config(small_base), params, given, compute_dtype(), CPU).memory
    model = init_adapter(small_base, params.adapter).train()
    weights = held_bytes(model)
    measured = weights + peak_bytes(lambda: train(model, given, params, tmp_path, Progress("t", 4, "steps")))
    assert estimated.weights == pytest.approx(weights, rel=1e-4)
    assert estimated.total == pytest.approx(measured, rel=0.02)
    assert estimated.activations + estimated.logits > 2 * estimated.weights


@pytest.mark.parametrize("adapter", [QLORA, LORA], ids=["qlora", "lora"])
def test_so_it_is_where_activations_are_computed_again(
    small_base: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    params, given = method(adapter, SFT, batch_size=2), rows(4, 512)
    estimated = estimate(read_model_config(small_base), params, given, compute_dtype(), CPU, recomputing=True).memory
    model = init_adapter(small_base, params.adapter).train()
    recompute_activations(model)
    weights = held_bytes(model)
    measured = weights + peak_bytes(lambda: train(model, given, params, tmp_path, Progress("t", 4, "steps")))
    assert estimated.total == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("adapter", [QLORA, LORA, LOREFT], ids=["qlora", "lora", "reft"])
@pytest.mark.parametrize("base", ["pico_base", "gpt2_base"])
def test_so_it_is_of_pico_models_of_other_shapes(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, adapter: dict[str, Any]
) -> None:
    folder: Path = request.getfixturevalue(base)
    params = method(adapter, SFT, batch_size=4, epochs=2)
    given = rows(4, 96)
    estimated = estimate(read_model_config(folder), params, given, compute_dtype(), CPU).memory
    model = init_adapter(folder, params.adapter).train()
    weights = held_bytes(model)
    measured = weights + peak_bytes(lambda: train(model, given, params, tmp_path, Progress("t", 2, "steps")))
    assert estimated.total == pytest.approx(measured, rel=0.15)


def step(model: Any, examples: Sequence[Example]) -> Tensor:
    return sft_loss(score_tokens(model, [row for (row,) in examples if isinstance(row, TokenRow)]).logp)


def full(config: Any, dtype: torch.dtype, examples: Sequence[Example], optimizer: Any) -> Cost:
    """A step in which every parameter is trained."""
    model = meta_model(config, None, dtype)
    to_fake_tensors(model, CPU)
    return dry_run_step(model, lambda: [(step(model, examples), {})], optimizer(model.parameters()), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_too(dtype: torch.dtype) -> None:
    given = rows(2, 256)
    estimated = full(SMALL, dtype, given, torch.optim.AdamW).memory
    model = LlamaForCausalLM(SMALL).to(dtype).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters())
    weights = held_bytes(model)

    def work() -> None:
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            step(model, given).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    assert estimated.total == pytest.approx(weights + peak_bytes(work), rel=0.02)
    assert estimated.gradients == pytest.approx(weights, rel=1e-3)
    assert estimated.optimizer == pytest.approx(2 * weights, rel=1e-3)


def test_full_fine_tuning_of_7b_with_momentum_takes_three_times_its_weights() -> None:
    """Llama-2-7B's shape in float32: 4 bytes for each of 6,738,415,616 weights, gradients and momenta."""
    import functools

    memory = full(
        LLAMA_2_7B, torch.float32, rows(1, 16), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ).memory
    each = 4 * 6_738_415_616
    assert each == pytest.approx(28e9, rel=0.04)  # "7B", roundly
    assert memory.weights == pytest.approx(each, rel=1e-4)
    assert (memory.gradients, memory.optimizer) == (each, each)
    assert 3 * each < memory.total < 3.05 * each


CHILD = """
import sys
from pathlib import Path
import psutil
from tasks.adapters.attach import init_adapter
from tasks.models.device import compute_dtype
from tasks.train.estimate.estimate import estimate
from tasks.train.estimate.meta_model import read_model_config
from tasks.core.progress import Progress
from tests.helpers.samples import LORA, LOREFT, QLORA, SFT, method
from tests.helpers.training import train
from tests.tasks.train.estimate.test_memory_tracker import CPU, held_bytes, rows

name, base, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
params = method({"qlora": QLORA, "lora": LORA, "reft": LOREFT}[name], SFT, batch_size=4, epochs=1)
model = init_adapter(base, params.adapter).train()
train(model, rows(1, 32), params, folder / "warm", Progress("t", 1, "steps"))  # every kernel has been loaded
before = psutil.Process().memory_info().rss - held_bytes(model)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
train(model, rows(4, 512), params, folder / "measured", Progress("t", 1, "steps"))
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) * 1024
estimated = estimate(read_model_config(base), params, rows(4, 512), compute_dtype(), CPU).memory.total
print("ratio", estimated / (peak - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of what is resident")
@pytest.mark.parametrize("name", ["qlora", "lora", "reft"])
def test_a_process_has_as_much_resident(small_base: Path, tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, name, small_base, tmp_path],
        cwd=ROOT,
        env=environment(MALLOC_MMAP_THRESHOLD_="65536"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("ratio ")[1]) == pytest.approx(1, abs=0.15)


def test_arithmetic_is_what_pytorch_counts_on_a_real_step(pico_base: Path) -> None:
    params = method({**LORA, "rank": 4}, SFT, batch_size=2)
    given = rows(2, 64)
    estimated = estimate(read_model_config(pico_base), params, given, compute_dtype(), CPU)
    model = init_adapter(pico_base, params.adapter).train()

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def addmm(to: Any, left: Any, right: Any, **_: Any) -> int:
        return int(2 * left[0] * left[1] * right[1])

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    ours = {  # PyTorch has no formula for these, and would count nothing
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.aten.addmm_: addmm,
    }
    loss_of(model, given, params)  # what the model can do is found out before the first step, and once
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        loss_of(model, given, params)[0].backward()
    assert estimated.step.flops == counter.get_total_flops()


def test_frozen_weights_need_4_operations_a_token_and_trained_ones_6() -> None:
    """Kaplan et al. 2020, section 2.1; of frozen weights no gradient is made. Attention and the adapter are little."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    given, tokens = rows(1, 64), 64
    every = (
        count(meta_model(config, None, torch.float32)).all - 2 * 512 * 1024
    )  # embeddings are looked up, the head is small
    assert full(config, torch.float32, given, torch.optim.AdamW).flops == pytest.approx(6 * every * tokens, rel=0.05)
    params = method({**LORA, "rank": 1}, SFT)
    for adapter in (params.adapter, method({**QLORA, "rank": 1}, SFT).adapter):
        frozen = estimate(config, params.model_copy(update={"adapter": adapter}), given, torch.float32, CPU)
        assert frozen.step.flops == pytest.approx(4 * every * tokens, rel=0.05)


def test_nothing_is_computed_and_nothing_is_loaded_for_a_model_that_fits_nowhere() -> None:
    """Twelve layers as wide as those of Llama-3-70B, full rows."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=12, num_attention_heads=64, vocab_size=128256
    )
    params = method(QLORA, SFT)
    memory = estimate(config, params, full_rows(params, 2048), torch.bfloat16, CPU).memory
    assert memory.total > 2**36
