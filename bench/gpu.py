"""Runs every path on the GPU that is here, compares it with the CPU, and measures training beside TRL.

    .venv/bin/python -m bench.gpu [--out gpu.json] [--minutes 8] [--only 8B]
    .venv/bin/python -m bench.gpu --pretend

First losses, log-probabilities and texts of `models/tiny` against the CPU in float32: to 1e-5 in float32, and their
means to 1e-3 in the card's 16 bits. Then SFT, ORPO, QLoRA and ReFT on random Llamas of 135M, 1.1B and 8B parameters:
tokens a second, the share of the card's peak, and memory; beside TRL at its best, with Liger's kernels where
liger-kernel is installed, both by turns. Every measurement has its own time; figures are printed and written as they
come, so that a run which is cut off still tells something. What does not fit the card or the time says so.

`--pretend` drives all of it on the CPU at pico shapes, so that it cannot rot; nothing that it prints is a measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench import orpo, sft
from bench.clock import ROOT, machine
from bench.limits import SHAPES, Shape, config_of
from bench.operations import Needed, operations_of
from bench.steps import BATCH_ROWS, RANK, TUNED, Ours, Theirs, exactly, side_by_side, token_row
from tasks.core.artifacts import atomic_write
from tasks.core.memory import ran_out
from tasks.core.stage import quiet_libraries

MINUTES = 8.0
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
GIB = 2**30
PICO = Shape(64, 128, 2, 2, 1, 512)


class Goal(NamedTuple):
    """What a figure should be: at least that, or at most."""

    figure: str
    bound: float
    at_least: bool = True

    def line(self, figures: Mapping[str, Any]) -> str:
        """Say what was measured beside what should be."""
        sign, found = ">=" if self.at_least else "<=", figures.get(self.figure)
        if found is None:
            return f"{self.figure} not measured (goal {sign} {self.bound:g})"
        met = found >= self.bound if self.at_least else found <= self.bound
        return f"{self.figure} {found:.2f} (goal {sign} {self.bound:g}: {'met' if met else 'MISSED'})"


PEAK = Goal("share_of_peak", 0.45)
GOALS = {
    "SFT": (Goal("times_trl", 1.5), PEAK),
    "ORPO": (Goal("times_trl", 2.0), PEAK),
    "QLoRA": (PEAK,),
    "ReFT": (PEAK,),
}
SMALL_CARD = Goal("memory_gib", 12.0, at_least=False)
"""Of QLoRA on 8B, with a row of 2,048 tokens, whose activations are computed again in the backward pass."""


class Place(NamedTuple):
    """Where is measured, and what.

    Attributes:
        device: of PyTorch.
        name: the driver's, or the CPU's.
        peak_flops: operations a second of products in `dtype`, by the data sheet; None: the card is not known.
        dtype: that is trained in there.
        shapes: the models, by name.
        tokens: of a prompt, and of a reply, at most.
        rows: of a pass, by the model's name.
        rounds: of passes that are timed, by turns.
    """

    device: Any
    name: str
    peak_flops: float | None
    dtype: Any
    shapes: Mapping[str, Shape]
    tokens: int
    rows: Mapping[str, int]
    rounds: int


class OutOfTime(BaseException):
    """A measurement has used up its time. Not an `Exception`, which libraries catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within this block once so many seconds have passed; in the main thread alone."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- places -----------------------------------------------------------------------------------------------------------


def the_card() -> Place:
    """Describe the card that is here.

    Raises:
        SystemExit: there is none.
    """
    import torch

    from tasks.models.cards import card_named
    from tasks.models.device import choices, compute_dtype, device

    where = device()
    if where.type != "cuda":
        raise SystemExit("there is no GPU here; --pretend drives all of this on the CPU")
    name, dtype = torch.cuda.get_device_name(where), choices(where).dtype
    card = card_named(name)
    peak = None if card is None else card.half_tflops if dtype == card.dtype else card.single_tflops
    shapes = {size: shape for size, shape in SHAPES.items() if size != "tiny"}
    rows = {"135M": 64, "1.1B": 64, "8B": 16}
    return Place(where, name, peak * 1e12 if peak else None, compute_dtype(), shapes, 512, rows, rounds=3)


def the_pretence() -> Place:
    """Describe the CPU as if it were a card, with pico models by the names of the true ones."""
    import torch

    sizes = [size for size in SHAPES if size != "tiny"]
    rows = dict.fromkeys(sizes, BATCH_ROWS)
    return Place(
        torch.device("cpu"), "a pretended card", 1e12, torch.float32, dict.fromkeys(sizes, PICO), 16, rows, rounds=1
    )


# --- models -----------------------------------------------------------------------------------------------------------


def random_model(shape: Shape, dtype: Any, device: Any, *, four_bit: bool) -> Any:
    """Make a Llama with random weights on a device, layer by layer, so that no more than one is ever in 16 bits."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = config_of(shape)
    config.num_hidden_layers, usual = 0, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
            for number in range(shape.layers):
                layer = LlamaDecoderLayer(model.config, number)
                model.model.layers.append(in_four_bits(layer) if four_bit else layer)
    finally:
        torch.set_default_dtype(usual)
    model.config.num_hidden_layers = shape.layers
    return _ready(model, four_bit)


def tiny_model(dtype: Any, device: Any, *, four_bit: bool) -> Any:
    """Load the base of the quickstart on a device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny", dtype=dtype).to(device)
    if four_bit:
        in_four_bits(model.model.layers)
    return _ready(model, four_bit)


def in_four_bits(module: Any) -> Any:
    """Hold all matrices of a module in NF4 with double quantization; in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn

    for name, linear in [*module.named_modules()]:
        if isinstance(linear, nn.Linear):
            weight = linear.weight
            held = Linear4bit(
                linear.in_features, linear.out_features, False, weight.dtype, quant_type="nf4", device="meta"
            )
            packed = Params4bit(weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            held.weight = packed.to(weight.device)
            module.set_submodule(name, held)
    return module


def _ready(model: Any, four_bit: bool) -> Any:
    from tasks.models.quantization import Quantization, prepare_for_training

    if four_bit:
        model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
        prepare_for_training(model, Quantization("nf4", double=True))
    return model.requires_grad_(False)


def with_adapter(model: Any, kind: str, *, moved: bool) -> Any:
    """Put the adapter of a kind of training on a model; `moved`: with an update that is not nothing."""
    import torch

    from tasks.adapters.attach import make_trainable
    from tasks.adapters.params import LoraAdapter, QloraAdapter, ReftAdapter

    shape: dict[str, Any] = {"rank": RANK, "alpha": 2.0 * RANK, "dropout": 0.0, "targets": "all-linear"}
    torch.manual_seed(1)  # on the CPU, as PEFT draws
    if kind == "ReFT":
        adapter: Any = ReftAdapter(name="loreft", rank=RANK, positions="f1+l1")
    else:
        adapter = QloraAdapter(name="qlora", **shape) if kind == "QLoRA" else LoraAdapter(name="lora", **shape)
    made = make_trainable(model, adapter).to(model.device).train()
    if moved:
        drawn = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (p for p in made.parameters() if p.requires_grad):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn).to(parameter))
    return made


# --- agreement with the CPU -------------------------------------------------------------------------------------------

PROMPTS = ("Question: How many legs has a cat? Answer:", "The sun is", "one two three four")


def numbers_of(path: str, dtype: Any, device: Any) -> Any:
    """Compute what a path gives on `models/tiny`, float64 on the CPU, (numbers,)."""
    import torch
    from transformers import AutoTokenizer

    from tasks.evaluate.continuation_scores import Continuation, score_continuations
    from tasks.inference.continuations import continuations
    from tasks.inference.params import GREEDY
    from tasks.merge.stage import kl_divergence

    model = with_adapter(tiny_model(dtype, device, four_bit=path == "QLoRA"), path, moved=True)
    vocabulary = model.config.vocab_size
    some = partial(exactly, random.Random(3), vocabulary=vocabulary)
    if path == "evaluation":
        endings = [Continuation(some(4 + n), some(1 + n % 3)) for n in range(64)]
        found = [each.logp for each in score_continuations(model.eval(), endings, tokens=512)]
    elif path == "merge probe":
        probes = [{"input_ids": some(12)} for _ in range(64)]
        found = [kl_divergence(model.eval(), tiny_model(dtype, device, four_bit=False).eval(), probes).mean_kl]
    elif path == "generation":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        written = continuations(model.eval(), tokenizer, prompts, 12, GREEDY)
        found = [float(token) for ids in written for token in (*ids, -1)]
    else:
        batch: Any = (orpo.pairs_of if path == "ORPO" else sft.rows_of)(24, 48, 48, vocabulary)
        loss = (orpo.our_loss if path == "ORPO" else sft.our_loss)(model, batch)
        loss.backward()
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise FloatingPointError("a gradient is not finite")
        found = [loss.item()]
    return torch.tensor(found, dtype=torch.float64)


PATHS = (*GOALS, "generation", "evaluation", "merge probe")


def agreement(path: str, place: Place) -> Iterator[dict[str, Any]]:
    """Compare a path in float32 and in the card's 16 bits with the CPU in float32, of weights that are the same.

    In float32 number by number. In 16 bits their mean, which is what losses and accuracies are of: one log-probability
    alone is rounded to 3e-3. Texts are compared in float32 alone: in 16 bits they are written, and may differ; so is
    the probe of merging: rounding two models adds to the divergence between them, which is told without a verdict.
    """
    import torch

    from tasks.models.device import seed_everything

    # a pretence rounds, too, as a CPU does
    half = str(place.dtype if place.dtype != torch.float32 else torch.bfloat16).removeprefix("torch.")
    expected: Any = None
    for name in ("float32", half):
        with computing_in(name):
            seed_everything(0)  # in float32 also without TF32
            expected = numbers_of(path, torch.float32, torch.device("cpu")) if expected is None else expected
            found = numbers_of(path, getattr(torch, name), place.device)
        off = distance(found, expected, of_means=name != "float32")
        yield {f"off_{name}": off if math.isfinite(off) else None}
        if name == "float32" or path not in ("generation", "merge probe"):
            yield {f"agrees_{name}": off <= TOLERANCES[name]}


def distance(found: Any, expected: Any, *, of_means: bool) -> float:
    """Compute how far numbers are apart, relatively where they are larger than 1; infinite if they are not as many."""
    if len(found) != len(expected):
        return math.inf
    if of_means:
        found, expected = found.mean(), expected.mean()
    return float((found - expected).norm() / max(float(expected.norm()), 1.0))


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Let all of temper compute in a dtype within this block."""
    from tasks.models.device import COMPUTE_DTYPE

    before = os.environ.get(COMPUTE_DTYPE)
    os.environ[COMPUTE_DTYPE] = dtype
    try:
        yield
    finally:
        del os.environ[COMPUTE_DTYPE]
        if before is not None:
            os.environ[COMPUTE_DTYPE] = before


# --- training ---------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Rows to train on, in batches; what of them is needed; the loss, and what makes TRL's trainer of the same rows."""

    batches: Sequence[Any]
    needed: Needed
    loss: Callable[[Any, Any], Any]
    make: Callable[..., Any] | None
    recomputes: bool = False


def work_of(kind: str, size: str, place: Place, folder: Path) -> Work:
    """Draw the rows of a measurement: pairs for ORPO, one of 2,048 tokens for QLoRA on 8B, else instructions."""
    from tasks.train.batching import batches_of

    shape, count = place.shapes[size], place.rows[size]
    if kind == "ORPO":
        pairs = orpo.pairs_of(count // 2, place.tokens, place.tokens, shape.vocabulary)
        lengths = [sum(row.tokens for row in pair) for pair in pairs]
        chosen = batches_of(0, lengths, BATCH_ROWS // 2, 0)
        needed = Needed.of_all([orpo.needed_of(pair) for pair in pairs])
        make = orpo.trainer_of(pairs, folder)
        return Work([[pairs[n] for n in batch] for batch in chosen], needed, orpo.our_loss, make)
    on_small_card = kind == "QLoRA" and size == "8B"
    if on_small_card:
        some = partial(exactly, random.Random(0), vocabulary=shape.vocabulary)
        rows = [token_row(some(2 * place.tokens), some(2 * place.tokens)) for _ in range(4)]
        batches = [[row] for row in rows]
    else:
        rows = sft.rows_of(count, place.tokens, place.tokens, shape.vocabulary)
        batches = [[rows[n] for n in b] for b in batches_of(0, [row.tokens for row in rows], BATCH_ROWS, 0)]
    needed = Needed.of_all([sft.needed_of(row) for row in rows])
    anchor = None if kind == "ReFT" else sft.trainer_of(rows, folder)
    return Work(batches, needed, sft.our_loss, anchor, recomputes=on_small_card)


def training(kind: str, size: str, place: Place) -> Iterator[dict[str, Any]]:
    """Measure a kind of training on a model of a size: ours first, then by turns with TRL's trainer."""
    from tasks.engine.memory import recompute_activations

    def model() -> Any:
        base = random_model(place.shapes[size], place.dtype, place.device, four_bit=kind == "QLoRA")
        return with_adapter(base, kind, moved=False)

    with tempfile.TemporaryDirectory() as name:
        work = work_of(kind, size, place, Path(name))
        held = held_gib(place, peak=False)
        ours = Ours(model(), work.batches, work.loss)
        if work.recomputes:
            recompute_activations(ours.model)
        ours()  # kernels are compiled and chosen
        forget_peak(place)
        seconds = statistics.median(ours() for _ in range(place.rounds))
        operations = operations_of(ours.model).of(work.needed)
        yield {
            "tokens_per_s": work.needed.tokens / seconds,
            "share_of_peak": operations / seconds / place.peak_flops if place.peak_flops else None,
            "memory_gib": held_gib(place) - held if on_card(place) else None,
        }
        if work.make is None:
            yield {"anchor": "none: TRL trains no ReFT"}
            return
        held = held_gib(place, peak=False)  # by our model, which waits
        theirs, says = anchor_of(work, model, place, len(work.batches[0]))
        yield {"anchor": says, "trl_memory_gib": held_gib(place) - held if on_card(place) else None}
        ratio = side_by_side(ours, theirs, place.rounds)
        yield {"times_trl": statistics.median(ratio.ratios), "ratios": ratio.ratios}


def anchor_of(work: Work, model: Callable[[], Any], place: Place, rows: int) -> tuple[Theirs, str]:
    """Make TRL's trainer at its best, and run it once: with Liger's kernels if installed, and as many rows as fit."""
    assert work.make
    liger = on_card(place) and find_spec("liger_kernel") is not None
    arguments: dict[str, Any] = {**TUNED, "gradient_checkpointing": work.recomputes}
    arguments["use_cpu"] = not on_card(place)
    if liger:  # TRL has a loss of its own, and asks for this
        arguments |= {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    says = "TRL with Liger" if liger else "TRL; Liger is skipped: liger-kernel is not installed"
    while True:
        sizes: dict[str, Any] = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": len(work.batches[0]) // rows,
        }
        forget_peak(place)
        try:
            theirs = Theirs(model(), work.make, **arguments, **sizes)
            theirs()
        except Exception as error:
            if not ran_out(error) or rows == 1:
                raise
            rows //= 2
        else:
            return theirs, f"{says}, {rows} rows at once"


def forget_peak(place: Place) -> None:
    """Begin to measure memory anew."""
    import torch

    free(place)
    if on_card(place):
        torch.cuda.reset_peak_memory_stats(place.device)


def held_gib(place: Place, *, peak: bool = True) -> float:
    """Return what PyTorch holds on the card, at most or now, GiB; 0 without one."""
    import torch

    if not on_card(place):
        return 0.0
    held = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return held(place.device) / GIB


def on_card(place: Place) -> bool:
    """Return whether this is no pretence."""
    return bool(place.device.type == "cuda")


def free(place: Place) -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if on_card(place):
        torch.cuda.synchronize(place.device)  # what a measurement that was cut off still has there
        torch.cuda.empty_cache()


# --- all of it --------------------------------------------------------------------------------------------------------


class Measurement(NamedTuple):
    """One thing to measure: its name, the seconds that it may take, what it yields, and what should come of it."""

    name: str
    seconds: float
    work: Callable[[], Iterator[dict[str, Any]]]
    goals: Sequence[Goal] = ()


def measurements(place: Place) -> list[Measurement]:
    """List all of them, the most telling first: what a run that is cut off should have told."""
    found = [Measurement(f"agreement, {path}", 15, partial(agreement, path, place)) for path in PATHS]
    for size, seconds in zip(place.shapes, (25, 30, 45), strict=True):
        for kind, goals in GOALS.items():
            small = (SMALL_CARD,) if (kind, size) == ("QLoRA", "8B") else ()
            found.append(
                Measurement(f"{kind}, {size}", seconds, partial(training, kind, size, place), (*goals, *small))
            )
    return found


def measured(each: Measurement, place: Place, left_s: float, tell: Callable[[], None], record: dict[str, Any]) -> None:
    """Take one measurement, as far as time and the card reach; `record` gets its figures as they come."""
    started = time.monotonic()
    try:
        with time_limit(min(each.seconds, left_s)):
            for figures in each.work():
                record |= figures
                tell()
        record["status"] = "done"
    except OutOfTime:
        record["status"] = f"cut off after {min(each.seconds, left_s):.0f} s"
    except Exception as error:  # whatever it is, the others are measured
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        record["status"] = "does not fit this card's memory" if ran_out(error) else f"FAILED: {what}"
    record["seconds"] = round(time.monotonic() - started, 1)
    free(place)


def line_of(each: Measurement, record: Mapping[str, Any]) -> str:
    """Say what a measurement gave, with the goals beside it."""
    of_goals = {goal.figure for goal in each.goals}
    parts = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record.items()
        if name not in ("name", "status", "ratios", *of_goals) and value is not None
    ]
    return "; ".join([f"{each.name}: {record['status']}", *(goal.line(record) for goal in each.goals), *parts])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all measurements; exit with 1 if one failed, or a path does not agree with the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON with all figures, written anew after each")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="measure what has this in its name, such as 8B or agreement")
    parser.add_argument("--pretend", action="store_true")
    given = parser.parse_args(arguments)
    quiet_libraries()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    import transformers

    from tasks.models.device import choices

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL, about its own arguments
    place = the_pretence() if given.pretend else the_card()
    ends = time.monotonic() + 60 * given.minutes
    told: dict[str, Any] = {
        "card": place.name,
        "pretended": given.pretend,
        "machine": f"{machine()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        "choices": choices(place.device)._asdict(),
        "liger": find_spec("liger_kernel") is not None,
        "results": [],
    }
    print(f"{place.name}; {told['machine']}; {told['choices']}")
    if given.pretend:
        print("PRETENDED, on the CPU at pico shapes: none of this is a measurement")

    def tell() -> None:
        if given.out:
            atomic_write(given.out, json.dumps(told, indent=2) + "\n")

    for each in [each for each in measurements(place) if given.only in each.name]:
        record: dict[str, Any] = {"name": each.name, "status": "running"}
        told["results"].append(record)
        left = ends - time.monotonic()
        if left > 0:
            measured(each, place, left, tell, record)
        else:
            record["status"] = "skipped: no time left"
        tell()
        print(line_of(each, record), flush=True)
    disagree = [r["name"] for r in told["results"] if any(r.get(f"agrees_{name}") is False for name in TOLERANCES)]
    failed = [r["name"] for r in told["results"] if r["status"].startswith("FAILED")]
    if disagree or failed:
        raise SystemExit(f"failed: {', '.join(failed) or 'none'}; not as on the CPU: {', '.join(disagree) or 'none'}")


if __name__ == "__main__":
    main()
