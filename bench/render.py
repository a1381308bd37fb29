"""Times rendering against TRL's own preprocessing of the same rows, and checks that the token ids are the same.

    .venv/bin/python -m bench.render [--rows 2000] [--rounds 5]

Anchors: TRL's SFTTrainer (its dataset preparation) and ORPOTrainer (its three maps), as shipped ("default") and with
`dataset_num_proc` at the number of cores ("tuned"). Rows: real preference pairs and instructions where they lie beside
the clone, else generated ones. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench.clock import REAL, ROOT, Ratio, alternate, machine
from flows.files.inspect import any_file
from tasks.core.stage import quiet_libraries

SOURCES = {"preference": "llama_factory/dpo_en_demo.json", "chat": "stanford_alpaca/alpaca_5000.json"}


def rows_of(kind: str, count: int) -> list[Any]:
    """Return `count` rows of one kind, repeated where the source has fewer."""
    from tasks.ingest.stage import Reading
    from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon

    path = REAL / SOURCES[kind]
    if path.is_file():
        found = [r for r in Reading("real", any_file(path)).records() if all(_texts(r))]
    else:
        print(f"no real data at {path}: generated rows instead")
        found = list(
            generate_rows(Recipe("made", kind, min(count, 5000), 1), read_lexicon(ROOT / "data" / "lexicon.yaml"))
        )
    return list(islice(cycle(found), count))


def _texts(record: Any) -> list[str]:
    messages = getattr(record, "messages", None) or record.prompt
    return [m.content for m in messages]


def ours(records: Sequence[Any], tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """Run what the stage does with the rows: tokens, masks, split, and the file."""
    from tasks.core.parquet import write_rows
    from tasks.render.params import Render
    from tasks.render.stage import render_rows, rendered_schema

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the anchor's own processes turn it off
    params = Render(held_out=0.0, max_tokens=1 << 20, too_long="refuse", loss_on="all")
    rendered, _ = render_rows(records, tokenizer, params)
    (kind,) = {record.kind for record in records}
    write_rows(folder / "ours.parquet", rendered["train", kind], rendered_schema(kind))
    return rendered["train", kind]


class Orpo:
    """TRL's ORPOTrainer: its three maps over the dataset."""

    def __init__(self, records: Sequence[Any], folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
        rows = [
            {
                "prompt": [{"role": m.role, "content": m.content} for m in r.prompt],
                "chosen": [{"role": "assistant", "content": r.chosen}],
                "rejected": [{"role": "assistant", "content": r.rejected}],
            }
            for r in records
        ]
        self.data = Dataset.from_list(rows)
        arguments = ORPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=1 << 20,
            gradient_checkpointing=False,
        )
        model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
        self.trainer = ORPOTrainer(
            model=model, args=arguments, train_dataset=self.data.select([0]), processing_class=tokenizer
        )
        self.tokenizer = tokenizer

    def __call__(self, processes: int | None) -> Any:
        """Run the three maps, as ORPOTrainer calls them."""
        from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

        data = self.data.map(maybe_extract_prompt, num_proc=processes)
        data = data.map(maybe_apply_chat_template, fn_kwargs={"processing_class": self.tokenizer}, num_proc=processes)
        return data.map(self.trainer.tokenize_row, num_proc=processes)

    def difference(self, found: Sequence[dict[str, Any]], theirs: Any, stop: int) -> int:
        """Count rows with other token ids, except for TRL's after the stop token: the template's rest, another stop."""
        different = 0
        for mine, other in zip(found, theirs, strict=True):
            same = mine["prompt_ids"] == other["prompt_input_ids"]
            for name in ("chosen", "rejected"):
                whole, own = other[f"{name}_input_ids"], mine["prompt_ids"] + mine[f"{name}_ids"]
                same = same and whole[: len(own)] == own and stop in whole[len(own) - 1 :]
            different += not same
        return different


class Sft:
    """TRL's SFTTrainer: its dataset preparation, prompts and completions as messages."""

    def __init__(self, records: Sequence[Any], folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        self.tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
        as_rows = [[{"role": m.role, "content": m.content} for m in r.messages] for r in records]
        self.data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in as_rows])
        self.arguments = [
            SFTConfig(
                output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_length=None, dataset_num_proc=n
            )
            for n in (None, os.cpu_count())
        ]
        model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny")
        self.trainer = SFTTrainer(
            model=model, args=self.arguments[0], train_dataset=self.data.select([0]), processing_class=self.tokenizer
        )

    def __call__(self, processes: int | None) -> Any:
        """Run the preparation, as SFTTrainer calls it."""
        arguments = self.arguments[processes is not None]
        return self.trainer._prepare_dataset(self.data, self.tokenizer, arguments, False, None, "train")

    def difference(self, found: Sequence[dict[str, Any]], theirs: Any, stop: int) -> int:
        """Count rows with other token ids or another mask, up to our last token; TRL's go on after the stop token."""
        different = 0
        for mine, other in zip(found, theirs, strict=True):
            length = len(mine["ids"])
            mask = [label != -100 for label in other["labels"][:length]]
            different += not (mine["ids"] == other["input_ids"][:length] and mine["mask"] == mask)
        return different


ANCHORS: dict[str, Callable[..., Any]] = {"preference": Orpo, "chat": Sft}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    quiet_libraries()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    from tasks.tokenization.chat_template import load_tokenizer

    print(machine())
    tokenizer = load_tokenizer(ROOT / "models" / "tiny")
    results: list[tuple[str, Ratio]] = []
    for kind, anchor in ANCHORS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            records = rows_of(kind, given.rows)
            theirs = anchor(records, folder)
            gc.freeze()  # the stage does so too; it helps the anchor as well
            mine = partial(ours, records, tokenizer, folder)
            different = theirs.difference(mine(), theirs(None), tokenizer.eos_token_id)
            print(f"{kind}: {len(records)} rows, {different} with other tokens than TRL's")
            for setting, processes in (("default", None), ("tuned", os.cpu_count())):
                ratio = alternate(mine, partial(theirs, processes), rounds=given.rounds)
                results.append((f"{kind}, TRL {setting}", ratio))
            results.append((f"{kind}, ours against ours", alternate(mine, mine, rounds=given.rounds)))
            started = time.perf_counter()
            mine()
            print(f"{kind}: {len(records) / (time.perf_counter() - started):,.0f} rows/s")
    print("\n| rows | ratio, median | least | 90% interval | ours s | theirs s |\n|---|---|---|---|---|---|")
    for name, ratio in results:
        print(f"| {name} | {ratio.row()} |")


if __name__ == "__main__":
    main()
