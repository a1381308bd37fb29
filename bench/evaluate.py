"""Times multiple choice against lm-eval's own HFLM on the same questions, and compares every answer.

    .venv/bin/python -m bench.evaluate [--shape tiny] [--dtype float32] [--setting 0-shot] [--questions 64] [--rounds 5]

Random Llamas, random words, a tokenizer of whole words; both sides get texts and begin with making tokens of them.
Anchors: HFLM as shipped ("default": one row at a time), and with the best of some batch sizes ("tuned"). Settings:
0-shot (HellaSwag's shape: a context of 80 tokens, four endings of 28), 10-shot (a context of 1,000, other examples for
each question, as lm-eval draws them), 10-shot fixed (the same examples for all), and 5-shot (MMLU's: 600 tokens of
examples for all, questions of 100, four answers of one token). Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.clock import Ratio, machine
from bench.limits import SHAPES, write_base
from bench.operations import matrices, peak_flops
from bench.steps import side_by_side, spin_while_waiting
from tasks.core.stage import quiet_libraries
from tasks.engine.memory import keep_freed_blocks
from tasks.evaluate.lm_eval_backend import language_model
from tasks.inference.params import GREEDY

BATCHES = (4, 16, 64)
"""The batch sizes among which the tuned anchor's is found, by one pass each over a part of the questions."""
SEARCHED = 16
"""Questions in that part."""


class Setting(NamedTuple):
    """Lengths in tokens: examples before all questions alike, a question with its own examples, each of its endings."""

    shared: int
    question: int
    ending: int
    endings: int = 4


SETTINGS = {
    "0-shot": Setting(0, 80, 28),
    "10-shot": Setting(0, 1000, 28),
    "10-shot fixed": Setting(920, 80, 28),
    "5-shot": Setting(600, 100, 1),
}


def tokenizer_of(vocabulary: int) -> Any:
    """Build a tokenizer whose tokens are the words w0, w1, ...; the first three are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        **{name: n for n, name in enumerate(("<pad>", "<s>", "</s>"))},
        **{f"w{n}": n for n in range(3, vocabulary)},
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def questions_of(setting: Setting, count: int, vocabulary: int) -> list[Any]:
    """Build requests as lm-eval makes them, one for each ending; questions of three quarters to all of the length."""
    from lm_eval.api.instance import Instance

    draw = random.Random(0)

    def words(tokens: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(tokens))

    def about(tokens: int) -> int:
        return draw.randint((3 * tokens + 3) // 4, tokens)

    shared, made = words(setting.shared), []
    for number in range(count):
        context = f"{shared} {words(about(setting.question))}".strip()
        for _ in range(setting.endings):
            pair = (context, f" {words(about(setting.ending))}")
            made.append(Instance("loglikelihood", {}, pair, number))
    return made


def needed_operations(model: Any, requests: Sequence[Any]) -> int:
    """Count the operations needed: each common beginning once, no ending's last token, the head at scored endings.

    As many times two operations as weights for each token, and as causal attention takes.
    """
    places, scored, attended = dict[tuple[int, str], int](), 0, 0
    for request in requests:
        context, ending = (text.split() for text in request.args)
        scored, place = scored + len(ending), 0
        for before, word in enumerate(context + ending[:-1]):
            if (place, word) not in places:
                places[place, word] = len(places) + 1
                attended += before + 1
            place = places[place, word]
    config = model.config
    layers = sum(2 * rows * columns for (rows, columns), _ in matrices(model))
    head: int = 2 * config.vocab_size * config.hidden_size
    pair: int = 4 * config.num_hidden_layers * config.hidden_size
    return layers * len(places) + head * scored + pair * attended


class Pass:
    """One pass of a model for lm-eval over all questions; what it answered is kept."""

    def __init__(self, lm: Any, requests: Sequence[Any]) -> None:
        self._lm, self._requests = lm, requests
        self.found: list[tuple[float, bool]] = []

    def __call__(self) -> float:
        """Run the pass; return its seconds."""
        started = time.perf_counter()
        self.found = self._lm.loglikelihood(self._requests, disable_tqdm=True)
        return time.perf_counter() - started

    def chosen(self, endings: int) -> list[int]:
        """Return the most likely ending of each question."""
        logp = [each[0] for each in self.found]
        each = [logp[start : start + endings] for start in range(0, len(logp), endings)]
        return [scores.index(max(scores)) for scores in each]


def anchors(model: Any, tokenizer: Any, requests: Sequence[Any], endings: int) -> Iterator[tuple[str, Pass]]:
    """Yield lm-eval as shipped, and with its best batch size."""
    from lm_eval.models.huggingface import HFLM

    def of(rows: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows)

    yield "default", Pass(HFLM(pretrained=model, tokenizer=tokenizer, backend="causal"), requests)
    part = requests[: SEARCHED * endings]
    took = {rows: min(Pass(of(rows), part)() for _ in range(2)) for rows in BATCHES}
    best = min(took, key=lambda rows: took[rows])
    yield f"tuned, {best} rows", Pass(of(best), requests)


def same(ours: Pass, theirs: Pass, setting: Setting, requests: Sequence[Any]) -> str:
    """Tell whether every answer is the same, and the largest log-probability difference, in nats per token.

    In bf16 lm-eval rounds log-probabilities to bf16 as well, so that some answers tie there.
    """
    chosen = zip(ours.chosen(setting.endings), theirs.chosen(setting.endings), strict=True)
    others = sum(one != other for one, other in chosen)
    verdicts = sum(a[1] != b[1] for a, b in zip(ours.found, theirs.found, strict=True))
    apart = max(
        abs(a[0] - b[0]) / len(request.args[1].split())
        for a, b, request in zip(ours.found, theirs.found, requests, strict=True)
    )
    wrong = "" if not others and not verdicts and apart <= 1e-4 else "NOT THE SAME: "
    return f"{wrong}{others} answers and {verdicts} verdicts differ, log-probabilities {apart:.0e} nats a token"


def report(name: str, setting: Setting, model: Any, tokenizer: Any, count: int, rounds: int) -> Iterator[str]:
    """Yield the table rows of a setting: each anchor, the control, the fraction of the limit, twice the questions."""

    def requests_of(questions: int) -> list[Any]:
        return questions_of(setting, questions, model.config.vocab_size)

    def our_pass(questions: Sequence[Any]) -> Pass:
        return Pass(language_model(model, tokenizer, batch_size=1, generation=GREEDY), questions)

    requests = requests_of(count)
    ours, before = our_pass(requests), peak_flops(model)
    for label, theirs in anchors(model, tokenizer, requests, setting.endings):
        ratio = side_by_side(ours, theirs, rounds)
        yield f"| {name}, HFLM {label} | {ratio.row()} | {same(ours, theirs, setting, requests)} |"
    control = side_by_side(ours, our_pass(requests), rounds)
    limit = statistics.median([before, peak_flops(model)])
    reached = needed_operations(model, requests) / statistics.median(control.ours_s) / limit
    yield f"| {name}, ours against ours{void(control)} | {control.row()} | fraction of the limit {reached:.2f} |"
    double = side_by_side(ours, our_pass(requests_of(2 * count)), rounds)
    per_question = [1000 * statistics.median(s) / n for s, n in ((double.ours_s, count), (double.theirs_s, 2 * count))]
    yield (
        f"| {name}, twice the questions against once | {double.row()} | "
        f"{per_question[0]:.2f} ms a question, then {per_question[1]:.2f} |"
    )


def void(control: Ratio) -> str:
    """Return a warning when the control shows that the machine was not quiet."""
    return "" if 0.97 <= statistics.median(control.ratios) <= 1.03 else " VOID: outside 0.97 to 1.03"


def main() -> None:
    """Print the machine and the table."""
    quiet_libraries()
    spin_while_waiting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="may be given several times; all if not")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    keep_freed_blocks()  # for both sides: they share a process
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), SHAPES[given.shape], torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype)).eval()
    tokenizer = tokenizer_of(SHAPES[given.shape].vocabulary)
    print("\n| setting | ratio, median | least | 90% interval | ours s | theirs s | in the same run |")
    print("|---" * 7 + "|")
    for name in given.setting or SETTINGS:
        setting = f"{name}, {given.shape}, {given.dtype}"
        for line in report(setting, SETTINGS[name], model, tokenizer, given.questions, given.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
