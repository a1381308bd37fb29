"""Writes docs/architectures.md: `python -m bench.architectures`, or with names of architectures prints theirs alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from bench.architectures.check import Outcome, check_model, reported
from bench.architectures.small_models import save_small_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
SECONDS = 120

INTRODUCTION = """# Architectures

Written by `python -m bench.architectures`: every architecture that transformers {version} loads for text, in its
smallest random form (two layers of 32 numbers), in float32. Each was scored, trained with LoRA on all its linear layers
and with ReFT, reloaded and merged; nothing differs from the model's own forward pass, or from what was trained, by more
than {nats:.0e} of a log-probability. {counts}

How rows are computed is found out on the model itself, by a few tokens, before the first step: **joined** in one
sequence without padding, **padded**, or **one length at a time** where padding would change a row. A model of which
decoder and head cannot be taken apart is run **as a whole**, through its full logits, which is slower and takes more
memory. A row's loss never depends on the rows beside it, also where positions follow the longest of them (LongRoPE,
dynamic scaling).

Text alone is trained. A base that sees images, too, is loaded and merged whole, and its text part is what learns.
"""
TABLE = ["| architecture | class | rows are computed | LoRA | ReFT |", "|---|---|---|---|---|"]


def main(names: Sequence[str]) -> None:
    """Check the architectures of these names, or all and write the page."""
    from transformers.models.auto import modeling_auto as known

    writes = [name for name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not names or name in names]
    sees = [name for name in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if not names or name in names]
    tables = [list(_rows(writes, sees=False)), list(_rows(sees, sees=True))]
    if names:
        print("\n".join(line for table in tables for line, _ in table))
        return
    whole = [outcome for _, outcome in tables[0]]
    works = Counter(isinstance(each, Outcome) and not each.lora for each in whole)[True]
    edits = Counter(isinstance(each, Outcome) and not each.reft for each in whole)[True]
    worst = max(each.nats for _, each in (*tables[0], *tables[1]) if isinstance(each, Outcome))
    counts = f"Of {len(whole)} that write text, {works} train with LoRA and merge, and {edits} train with ReFT."
    text = INTRODUCTION.format(version=version("transformers"), nats=worst, counts=counts)
    lines = [text, *TABLE, *(line for line, _ in tables[0])]
    lines += [
        "",
        "## With images",
        "",
        "Where a small form needs more than its sizes, none was made, and the reason is the library's own.",
        "",
    ]
    lines += [*TABLE, *(line for line, _ in tables[1])]
    PAGE.write_text("\n".join(lines) + "\n")


def _rows(names: Sequence[str], *, sees: bool) -> Iterator[tuple[str, Outcome | str]]:
    """Yield the line of each architecture, each checked in a process of its own: what one breaks stays there."""
    import tasks.adapters.reft.tuner
    import tasks.merge.merged_model
    import tasks.train.trainer  # noqa: F401  # once, before processes are made

    for number, name in enumerate(names):
        print(f"{number + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
        kind, outcome = _apart(name, sees)
        if isinstance(outcome, str):
            line = f"| {name} | {kind} | not checked: {_cell(outcome)} | | |"
        else:
            line = f"| {name} | {kind} | {outcome.way} | {_cell(outcome.lora)} | {_cell(outcome.reft)} |"
        yield line, outcome


def _cell(why: str) -> str:
    return why.replace("|", "/").replace("\n", " ") if why else "yes"


def _apart(name: str, sees: bool) -> tuple[str, Outcome | str]:
    folder = Path(tempfile.mkdtemp())
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(2)
            os.open(os.devnull, os.O_WRONLY)
            (folder / "outcome").write_text(json.dumps(_checked(name, sees, folder)))
        os._exit(0)
    os.waitpid(child, 0)
    answer = folder / "outcome"
    kind, fields = json.loads(answer.read_text()) if answer.exists() else ("", "it crashed, or took too long")
    shutil.rmtree(folder)
    return kind, fields if isinstance(fields, str) else Outcome(*fields)


def _checked(name: str, sees: bool, folder: Path) -> tuple[str, Outcome | str]:
    import torch

    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    kind = reported(lambda: save_small_model(name, folder / "base", sees=sees))
    if isinstance(kind, str):
        return "", kind
    return kind.__name__, reported(lambda: check_model(folder / "base", folder))


if __name__ == "__main__":
    main(sys.argv[1:])
