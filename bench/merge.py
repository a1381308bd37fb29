"""Times merging a LoRA adapter, as a command from a cold start, against PEFT's merge_and_unload.

    .venv/bin/python -m bench.merge [--rounds 5] [--sizes 135m 1b]

Anchor: one process that loads base and adapter with transformers and PEFT, merges, and saves ("default": as PEFT's
guide has it, in the base's own bfloat16; "tuned": the base loaded without a second copy of it, no safe merge). Ours is
`temper merge`, with its manifest of digests. A third line times copying the base's files within the kernel, with a sync
at the end: what no merge can be faster than. Peak memory is the resident set of the process (ru_maxrss). Random
weights; rank 16 on all linear layers. `--quality` compares merges of an NF4 adapter of the shipped base with the model
that was trained. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.clock import ROOT, Ratio, machine

SIZES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, tuned = sys.argv[1:]
more = {"low_cpu_mem_usage": True} if tuned == "tuned" else {}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto", **more), adapter)
model.merge_and_unload(safe_merge=tuned != "tuned").save_pretrained(out)
"""


class Ran(NamedTuple):
    """A process that ended: seconds, and its largest resident set."""

    seconds: float
    peak_mb: float


def run(command: Sequence[str], out: Path) -> Ran:
    """Run a command that writes a folder, from a cold start of the interpreter, and remove the folder."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not any(out.glob("*.safetensors")):
        raise SystemExit(f"failed: {' '.join(command)}")
    shutil.rmtree(out)
    return Ran(seconds, usage.ru_maxrss / 1024)


def copy(base: Path, out: Path) -> Ran:
    """Copy the base's files as fast as the machine can, and wait for the disk."""
    started = time.perf_counter()
    out.mkdir()
    for file in base.iterdir():
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            left = file.stat().st_size
            while left:
                left -= os.copy_file_range(source.fileno(), target.fileno(), left)
            os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return Ran(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def make(size: str, folder: Path) -> None:
    """Write a base of random numbers in bfloat16 and a PEFT adapter of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size]))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.02)
    tuned.save_pretrained(folder / "adapter")


def check(folder: Path, out: Path) -> str:
    """Count the merged numbers that are not the float64 sum rounded once, ours and PEFT's."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    lora = load_file(folder / "adapter" / "adapter_model.safetensors")
    wrong = total = 0
    with (
        safe_open(folder / "base" / "model.safetensors", "pt") as base,
        safe_open(out / "model.safetensors", "pt") as made,
    ):
        for name in base.keys():  # noqa: SIM118  # not a mapping
            a, b = (lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB")
            exact = base.get_tensor(name).double()
            if a is not None and b is not None:
                exact = exact + 2 * (b.double() @ a.double())
            wrong += int((made.get_tensor(name) != exact.to(torch.bfloat16)).sum())
            total += exact.numel()
    # a sum in float32 may fall on the other side of a rounding boundary of bfloat16, one time in many thousand
    assert wrong < 1e-4 * total, f"{wrong} of {total} numbers are wrong: what was timed is no merge"
    return f"{wrong} of {total:,} numbers ({wrong / total:.1e})"


def bench(size: str, rounds: int, folder: Path) -> None:
    """Print the table of one size."""
    # torch stays out of this process: what a child holds at most counts from what its parent holds
    again = [sys.executable, "-m", "bench.merge"]
    subprocess.run([*again, "--make", size, str(folder)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    temper = [str(Path(sys.executable).parent / "temper"), "merge", base, adapter, out]
    contenders: dict[str, Callable[[], Ran]] = {
        "temper": lambda: run(temper, folder / "out"),
        "temper again": lambda: run(temper, folder / "out"),
        "PEFT, default": lambda: run([sys.executable, "-c", PEFT, base, adapter, out, "default"], folder / "out"),
        "PEFT, tuned": lambda: run([sys.executable, "-c", PEFT, base, adapter, out, "tuned"], folder / "out"),
        "copying the base": lambda: copy(folder / "base", folder / "out"),
    }
    subprocess.run(temper, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"\n{size}: not what float64 gives, rounded once: ", end="", flush=True)
    subprocess.run([*again, "--check", str(folder)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder / "out")
    times: dict[str, list[Ran]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order:
            times[name].append(contenders[name]())
    print("| against | theirs / ours: median | least | 90% interval | ours, s | theirs, s | their peak / ours |")
    print("|---|---|---|---|---|---|---|")
    ours = times["temper"]
    peak = max(each.peak_mb for each in ours)
    for name, theirs in list(times.items())[1:]:
        ratio = Ratio(
            [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)],
            [each.seconds for each in ours],
            [each.seconds for each in theirs],
        )
        most = statistics.median(each.peak_mb for each in theirs)
        print(f"| {name} | {ratio.row()} | {most:.0f} MB / {peak:.0f} MB = {most / peak:.1f} |", flush=True)
    control = statistics.median(b.seconds / a.seconds for a, b in zip(ours, times["temper again"], strict=True))
    if not 0.97 <= control <= 1.03:
        print(f"void: the same command twice differs by {control:.2f}; something else runs")


def quality() -> None:
    """KL to the adapter model of merges of a QLoRA adapter: PEFT's in 4 bits, onto both bases, and the one taken."""
    from peft import PeftModel

    from flows.files.merge import PROBE_TEXTS
    from tasks.adapters.attach import load_adapted
    from tasks.adapters.params import QloraAdapter
    from tasks.merge.stage import kl_divergence, merge_closest
    from tasks.orchestration.params import load_params
    from tasks.tokenization.tokenizer import read_tokenizer

    base, trained = ROOT / "data" / "base", ROOT / "data" / "adapters" / "qlora"
    if not (trained / "adapter_config.json").is_file():
        raise SystemExit("run `temper run` first: it trains the adapter that is merged here")
    adapter = load_params(ROOT / "params.yaml").train["qlora"].adapter
    if not isinstance(adapter, QloraAdapter):
        raise SystemExit("the method qlora of params.yaml has another adapter")
    tokenizer = read_tokenizer(base)
    probes = [{"input_ids": list(tokenizer(text)["input_ids"])} for text in PROBE_TEXTS]
    model = load_adapted(base, trained, adapter)
    again = load_adapted(base, trained, adapter)
    assert isinstance(again, PeftModel)
    theirs = kl_divergence(model, again.merge_and_unload(), probes)
    with tempfile.TemporaryDirectory() as place:
        told, _ = merge_closest(base, trained, model, probes, Path(place), onto="closest", most_bytes=1 << 40)
    print("\n| merge of the quickstart's QLoRA | mean KL to the adapter model, nats/token | largest logit difference |")
    print("|---|---|---|")
    print(f"| PEFT, in 4 bits | {theirs.mean_kl:.2e} | {theirs.max_logit_difference:.3g} |")
    for name, each in told["onto"].items():
        print(f"| onto the {name} weights | {each['mean_kl']:.2e} | {each['max_logit_difference']:.3g} |")
    print(f"\nPEFT's KL / that of the one taken: {theirs.mean_kl / told['mean_kl']:.0f}")


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--make", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        return make(given.make[0], Path(given.make[1]))
    if given.check:
        return print(check(given.check, given.check / "out"))
    print(machine())
    (ROOT / ".temper").mkdir(exist_ok=True)
    for size in given.sizes:
        with tempfile.TemporaryDirectory(prefix="merge", dir=ROOT / ".temper") as folder:
            bench(size, given.rounds, Path(folder))
    if given.quality:
        quality()
    return None


if __name__ == "__main__":
    main()
