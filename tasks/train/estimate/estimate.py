"""Estimates of a training before it is run: memory and time of each method, what fits, and what would.

Memory is that of the largest step, measured on the meta device. Time is rough: work by the rates that this
machine reaches in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.params import (
    AdaloraAdapter,
    AnyAdapter,
    LoraAdapter,
    PeftAdapter,
    PrefixAdapter,
    PTuningV2Adapter,
    QloraAdapter,
)
from tasks.core.errors import BadModel, BadParams
from tasks.core.memory import GIB, free_bytes, readable_bytes
from tasks.engine.memory import AdaptiveMicroBatch, recompute_activations
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rendered_rows import Row
from tasks.inference.rows import TokenRow
from tasks.train.batching import all_batches, lengths_of, shapes_of
from tasks.train.estimate.meta_model import Parameters, count, meta_model, to_fake_tensors
from tasks.train.examples import Example
from tasks.train.losses import losses_for
from tasks.train.optimizers import groups_of, optimizer_for
from tasks.train.params import Method, PairObjective, ReferringObjective

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from tasks.train.estimate.memory_tracker import Cost, MemoryPeak

MACHINES_GIB = (8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sizes of memory that one can buy or rent."""

_RATED_S = 0.1
_RATED_WIDTH = 1024
_RATED_NUMBERS = 16 << 20


class Machine(NamedTuple):
    """Machine that a training would run on.

    Attributes:
        device: where tensors are, `cpu` or `cuda`.
        free_bytes: memory that a training could have.
        process_bytes: memory of a process before there is a tensor: Python and its libraries.
    """

    device: str
    free_bytes: int
    process_bytes: int

    @property
    def room_bytes(self) -> int:
        """Return the bytes that are left for tensors."""
        return self.free_bytes - self.process_bytes


class Rates(NamedTuple):
    """Speed of a machine: matrix products, and memory."""

    flops_per_s: float
    bytes_per_s: float


class Work(NamedTuple):
    """Arithmetic, and bytes that are read and written."""

    flops: float
    moved_bytes: float


class Estimate(NamedTuple):
    """Needs of a method.

    Attributes:
        parameters: trained, and all.
        memory: at the largest step.
        step: the work of the mean step.
        steps: of the whole training.
    """

    parameters: Parameters
    memory: MemoryPeak
    step: Work
    steps: int

    def step_s(self, rates: Rates) -> float:
        """Estimate the mean step's time, roughly: as if arithmetic and memory waited for each other."""
        return self.step.flops / rates.flops_per_s + self.step.moved_bytes / rates.bytes_per_s


class Suggestion(NamedTuple):
    """Change of params, or a machine, with which training would fit, and its peak memory then."""

    change: str
    total_bytes: int


# --- one method -------------------------------------------------------------------------------------------------------


def estimate(
    config: PreTrainedConfig,
    method: Method,
    examples: Sequence[Example],
    dtype: torch.dtype,
    device: torch.device,
    *,
    all_rows: bool = True,
    recomputing: bool = False,
) -> Estimate:
    """Estimate what training a model of this shape by a method on these rows needs.

    Args:
        config: the model's configuration.
        method: as it is in params.
        examples: the rows.
        dtype: what the weights are loaded in.
        device: where it is trained.
        all_rows: whether there are no others; else the training is taken to be as long as its method needs it to be.
        recomputing: whether activations are computed again in the backward pass.

    Raises:
        BadModel: the method does not fit the model, or its step cannot be run on the meta device.
    """
    chosen = all_batches(lengths_of(examples), method)
    examples = list(examples)  # epochs share what is made of rows
    batches = [[examples[i] for i in rows] for rows in chosen]
    steps = len(batches) if all_rows else max(len(batches), _least_steps(method.adapter))
    costs = [
        (_padded_tokens(batch), _rehearsed(config, method, examples, batch, dtype, device, steps, recomputing))
        for batch in _heaviest(batches)
    ]
    tokens, longest = costs[0]
    share = sum(map(_padded_tokens, batches)) / len(batches) / tokens
    mean = Work(share * longest.flops, share * longest.moved_bytes)
    memory = max((cost.memory for _, cost in costs), key=lambda memory: memory.total)
    return Estimate(count(meta_model(config, method.adapter, dtype, steps)), memory, mean, len(batches))


def _least_steps(adapter: AnyAdapter) -> int:
    """Return the least steps that a method needs: AdaLoRA at least one in which ranks are moved."""
    return adapter.warmup_steps + adapter.final_steps + 1 if isinstance(adapter, AdaloraAdapter) else 1


def full_rows(method: Method, max_tokens: int, *, pairs: bool = False) -> list[Example]:
    """Build one step's rows at their longest, all target tokens, for when no rows have been rendered yet."""
    if pairs:
        return [(PairRow([0] * max_tokens, [0] * max_tokens),)] * method.batch_size
    row = TokenRow([0] * max_tokens, [False] + [True] * (max_tokens - 1), 1)
    replies = 2 if isinstance(method.objective, PairObjective) else 1
    return [(row,) * replies] * method.batch_size


def cut(examples: Sequence[Example], max_tokens: int) -> list[Example]:
    """Truncate each sequence of the rows to `max_tokens` tokens."""
    return [tuple(_cut(sequence, max_tokens) for sequence in example) for example in examples]


def longest_of(examples: Sequence[Example]) -> int:
    """Return the tokens of the longest sequence, or of the longest side of a pair."""
    sequences = [sequence for example in examples for sequence in example]
    return max(max(len(s.input_ids), len(s.target_ids)) if isinstance(s, PairRow) else s.tokens for s in sequences)


def _cut(row: Row, max_tokens: int) -> Row:
    if isinstance(row, PairRow):
        return PairRow(row.input_ids[:max_tokens], row.target_ids[:max_tokens])
    return row._replace(
        ids=row.ids[:max_tokens], mask=row.mask[:max_tokens], prompt_tokens=min(row.prompt_tokens, max_tokens)
    )


def _heaviest(batches: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    """Those that can need most: with the most tokens, padding included, and with the most targets.

    Of batches with as many tokens it is one with padding, which attention has to be told of.
    """
    longest = max(batches, key=lambda batch: (_padded_tokens(batch), -_tokens(batch)))
    most_targets = max(batches, key=_target_tokens)
    return [longest] if longest is most_targets else [longest, most_targets]


def _tokens(batch: Sequence[Example]) -> int:
    return sum(lengths_of(batch))


def _padded_tokens(batch: Sequence[Example]) -> int:
    sequences = [sequence.tokens for example in batch for sequence in example]
    return len(sequences) * max(sequences)


def _target_tokens(batch: Sequence[Example]) -> int:
    return sum(sequence.scored_tokens for example in batch for sequence in example)


def _rehearsed(
    config: PreTrainedConfig,
    method: Method,
    examples: Sequence[Example],
    batch: Sequence[Example],
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    recomputing: bool,
) -> Cost:
    from tasks.models.device import choices
    from tasks.train.estimate.memory_tracker import FakeOptimizerState, dry_run_step

    model = meta_model(config, method.adapter, dtype, steps)
    to_fake_tensors(model, device)
    if recomputing:
        recompute_activations(model)
    if method.optimizer == "adamw" and not choices(device).fused_optimizer:
        optimizer = optimizer_for(model, method)
    else:  # of one kernel, which makes no temporary tensors
        states, bits = 1 if method.optimizer.startswith("lion") else 2, 8 if method.optimizer.endswith("8bit") else 32
        optimizer = FakeOptimizerState([group for group in groups_of(model, method) if group["params"]], states, bits)
    objective = method.objective
    ahead = isinstance(objective, ReferringObjective) and objective.reference == "precomputed"
    reference = _as_many_numbers if ahead else None
    losses = losses_for(model, examples, method, AdaptiveMicroBatch(method.micro_batch_size, fit=False), reference)
    try:
        cost = dry_run_step(model, lambda: losses.of_step(batch), optimizer, method.max_grad_norm)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise BadModel(
            "a step of this method cannot be rehearsed without weights",
            where=f"{method.adapter.name} on {config.model_type}",
            got=f"{type(error).__name__}: {error}".split("\n")[0],
        ) from error
    below = losses.below
    kept = below.kept_bytes(shapes_of(examples)) - below.kept_bytes(shapes_of(batch)) if below else 0
    memory = cost.memory
    return cost._replace(memory=memory._replace(activations=memory.activations + kept, total=memory.total + kept))


def _as_many_numbers(rows: Sequence[TokenRow]) -> Tensor:
    """Build a placeholder for a reference's log-probabilities, (rows,)."""
    import torch

    return torch.zeros(len(rows))


# --- the machine ------------------------------------------------------------------------------------------------------


def this_machine(device: torch.device) -> Machine:
    """Measure what is free here now; this process has loaded what a training loads."""
    import psutil
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Machine(torch.cuda.get_device_name(device), free, 0)
    return Machine("cpu", free_bytes(), psutil.Process().memory_info().rss)


def a_card(name: str) -> tuple[Machine, torch.dtype, Callable[[torch.dtype], Rates]]:
    """Describe a card that need not be here: its memory, the dtype that it trains in, and its rates in a dtype.

    Raises:
        BadParams: it is not known.
    """
    import torch

    from tasks.models.cards import CARDS, CONTEXT_GIB, REACHED

    card = CARDS.get(name.lower())
    if card is None:
        raise BadParams("is no card that is known", where="--device", got=name, expected=", ".join(CARDS))
    machine = Machine(card.name, int(card.memory_gib * GIB), int(CONTEXT_GIB * GIB))

    def rates_of(dtype: torch.dtype) -> Rates:
        tflops = card.half_tflops if dtype == usual else card.single_tflops
        return Rates(REACHED * tflops * 1e12, 2 * REACHED * card.gb_per_s * 1e9)

    usual: torch.dtype = getattr(torch, card.dtype)
    return machine, usual, rates_of


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure what this machine reaches in a tenth of a second each: a square matrix product, and a copy."""
    import torch

    square = torch.ones(_RATED_WIDTH, _RATED_WIDTH, dtype=dtype, device=device)
    product_s = _seconds(lambda: square @ square, device)
    numbers = torch.ones(_RATED_NUMBERS, dtype=dtype, device=device)
    target = torch.empty_like(numbers)
    copy_s = _seconds(lambda: target.copy_(numbers), device)
    return Rates(2 * _RATED_WIDTH**3 / product_s, 2 * numbers.nbytes / copy_s)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of one run of some work, after a warm-up that is not counted."""
    import time

    import torch

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    times, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _RATED_S:
        work()
        finish()
        times += 1
    return (time.perf_counter() - begin) / times


def must_recompute(config: PreTrainedConfig, method: Method, examples: Sequence[Example]) -> bool:
    """Return whether training fits here only if activations are recomputed in the backward pass; log it if so.

    Not where trained keys and values stand before the first token, which recomputing would lose; nor where an estimate
    cannot be made.
    """
    from tasks.models.device import compute_dtype, device

    if isinstance(method.adapter, PrefixAdapter | PTuningV2Adapter | PeftAdapter):
        return False
    room = this_machine(device()).room_bytes
    needs = partial(estimate, config, method, examples, compute_dtype(), device())
    try:
        kept = needs().memory.total
        if kept <= room:
            return False
        needed = needs(recomputing=True).memory.total
    except BadModel as error:
        print(f"whether a step fits cannot be told before it is taken: {error.line()}", flush=True)
        return False
    print(
        f"a step needs {readable_bytes(kept)} and {readable_bytes(room)} are free: activations are computed again in "
        f"the backward pass, which needs {readable_bytes(needed)}",
        flush=True,
    )
    return True


# --- what would fit ---------------------------------------------------------------------------------------------------


def suggest(
    total: Callable[[Method, int | None], int], name: str, method: Method, longest: int, machine: Machine
) -> Iterator[Suggestion]:
    """List changes that would let a method fit that does not: each was estimated as well.

    Args:
        total: the memory of a method in bytes, with rows cut to a number of tokens.
        name: the method's.
        method: as it is in params.
        longest: tokens of its longest sequence.
        machine: where it should fit.
    """
    whole, room = total(method, None), machine.room_bytes

    def with_rows(adapter: AnyAdapter, rows: int) -> int:
        return total(method.model_copy(update={"adapter": adapter, "micro_batch_size": rows}), None)

    at_once = method.micro_batch_size
    fewer = largest(partial(with_rows, method.adapter), at_once, whole, room)
    if fewer:
        yield Suggestion(f"train.{name}.micro_batch_size={fewer[0]}", fewer[1])
    for adapter in _lighter(method.adapter):
        needed = with_rows(adapter, at_once)
        if needed <= room:
            yield Suggestion(f"train.{name}.adapter: {_named(adapter)}", needed)
        elif needed < whole and (rows := largest(partial(with_rows, adapter), at_once, needed, room)):
            yield Suggestion(f"train.{name}.adapter: {_named(adapter)}, micro_batch_size={rows[0]}", rows[1])
    shorter = largest(partial(total, method), longest, whole, room, least=min(longest, 16))
    if shorter:
        yield Suggestion(f"render.max_tokens={shorter[0]}", shorter[1])
    needed_gib = (whole + machine.process_bytes) / GIB
    size = next((size for size in MACHINES_GIB if size >= needed_gib), math.ceil(needed_gib))
    yield Suggestion(f"a machine with {size} GiB of memory free", whole)


def largest(
    needed: Callable[[int], int], now: int, needed_now: int, room: int, least: int = 1
) -> tuple[int, int] | None:
    """Find a number below `now`, as large as possible, that needs no more than `room`, and how much it needs.

    What is needed grows with the number at least as a straight line does, so that the line between the ends says
    a number that fits.
    """
    if now <= least or (needed_least := needed(least)) > room:
        return None
    slope = (needed_now - needed_least) / (now - least)
    guess = min(now - 1, least + int((room - needed_least) / slope)) if slope else least
    for number in range(guess, least, -1):
        if (found := needed(number)) <= room:
            return number, found
    return least, needed_least


def _lighter(adapter: AnyAdapter) -> list[AnyAdapter]:
    """List adapters that may take less memory than this one, the most alike first."""
    if isinstance(adapter, QloraAdapter):
        return []
    shape: dict[str, Any] = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}
    if isinstance(adapter, LoraAdapter):
        shape = adapter.model_dump(exclude={"name"})
    four_bit = QloraAdapter(name="qlora", quantization="nf4", double_quantization=True, compute_dtype="auto", **shape)
    return [four_bit] if isinstance(adapter, LoraAdapter) else [LoraAdapter(name="lora", **shape), four_bit]


def _named(adapter: AnyAdapter) -> str:
    return f"{adapter.name} of rank {adapter.rank}" if isinstance(adapter, LoraAdapter | QloraAdapter) else adapter.name
