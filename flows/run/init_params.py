"""Write a first params.yaml for one's own data: what the rows are decides what it says, each value with its reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from flows.files.inspect import look_into
from flows.files.show_tokens import render_record
from flows.run.edit_params import replace_params
from tasks.core import pipeline
from tasks.core.errors import BadData
from tasks.core.records import ChatExample, LabelledReply, PreferencePair, Record
from tasks.orchestration.params import load_params
from tasks.render.params import Render

USUAL_METHODS = {"chat": ("sft", "qlora"), "preference": ("orpo", "orpo"), "labelled": ("kto", "kto")}
"""The objective that suits a kind of rows, and what the method is called."""
TOKENS_STEP, MOST_ROWS = 64, 2000
SMALL_BYTES = 512 << 20
"""Weights below it are of a small model, which wants a higher learning rate than one of billions of parameters."""
SHORT_WORDS = 5
"""Replies of a median length up to it can be held against their targets word by word."""


class Lengths(NamedTuple):
    """Tokens of the rows that were rendered: the longest, and the context of the model, 0 where it has no limit."""

    longest: int
    context: int

    def max_new_tokens(self, wanted: int) -> int:
        """Return how long an answer may be: at most a third of what the model reads."""
        return min(wanted, self.context // 3) if self.context else wanted

    def max_tokens(self, new_tokens: int) -> int:
        """Return the next multiple of 64 that holds the longest row, if the model can still answer a prompt as long."""
        wanted = -(-self.longest // TOKENS_STEP) * TOKENS_STEP
        return min(wanted, self.context - new_tokens) if self.context else wanted


def init_params(workspace: Path, source: Path, base: Path) -> str:
    """Write params.yaml for a file or folder of rows; what it was is kept as params.yaml.before.

    Args:
        workspace: the folder with dvc.yaml.
        source: the rows, in any form that `temper inspect` knows.
        base: a model folder.

    Returns:
        What was written.

    Raises:
        BadData: the source holds no rows that a method here learns from.
        BadModel: the base has no tokenizer with a chat template.
    """
    files, records, refused = look_into(source, Counter())
    kinds = Counter(record.kind for record in records)
    methods = [USUAL_METHODS[kind] for kind in USUAL_METHODS if kinds[kind]]
    if not methods:
        raise BadData(
            "holds no chats, preference pairs or labelled replies",
            where=str(source),
            got=", ".join(f"{count} {kind} rows" for kind, count in kinds.items()),
            fix="start from recipes/scratch-llama.yaml (texts) or recipes/lora-mt0-twitter.yaml (inputs and targets)",
        )
    text = _text(workspace, source, base, records, sum(file.rows for file in files), len(refused), methods)
    with TemporaryDirectory() as folder:
        draft = Path(folder, pipeline.PARAMS)
        draft.write_text(text, encoding="utf-8")
        load_params(draft)
    replace_params(workspace / pipeline.PARAMS, text)
    return text


def row_lengths(records: Sequence[Record], base: Path) -> Lengths:
    """Count the tokens of up to 2,000 rows, spread over the whole source, as the base's template renders them."""
    from tasks.tokenization.chat_template import load_tokenizer
    from tasks.tokenization.model_config import read_config

    tokenizer = load_tokenizer(base)
    counts = [0]
    for record in records[:: max(1, len(records) // MOST_ROWS)]:
        try:
            counts += [len(ids) for _, ids, _ in render_record(record, tokenizer, Render())]
        except BadData:
            continue  # `render` refuses it with its reason
    return Lengths(max(counts), int(getattr(read_config(base), "max_position_embeddings", 0) or 0))


def _text(
    workspace: Path,
    source: Path,
    base: Path,
    records: Sequence[Record],
    rows: int,
    refused: int,
    methods: Sequence[tuple[str, str]],
) -> str:
    lengths, name = row_lengths(records, base), _name(source)
    exact = median(_reply_words(records)) <= SHORT_WORDS
    new_tokens = lengths.max_new_tokens(32 if exact else 128)
    max_tokens = lengths.max_tokens(new_tokens)
    cut = "; that is cut, as the model reads no more and has to answer" if lengths.longest > max_tokens else ""
    steps = 32 if len(records) >= 256 else 8
    lines = [
        "# yaml-language-server: $schema=params.schema.json",
        f"# {rows} rows of {source.name}. What is not said here has its default: `temper params` prints every value.",
        "ingest:",
        "  sources:",
        f"    {name}:",
        f"      kind: {'folder' if source.is_dir() else 'file'}",
        f"      path: {_path(source, workspace)}",
        *(['      glob: "**/*"'] if source.is_dir() else []),
    ]
    if refused:
        share = -(-refused * 1000 // max(1, rows)) / 1000
        lines.append(f"      max_refused: {share} # {refused} rows are malformed; `temper inspect` says which and why")
    lines += [
        "validate: {}",
        "base:",
        "  kind: local",
        f"  path: {_path(base, workspace)}",
        "render:",
        "  held_out: 0.1 # of the rows, for evaluation",
        f"  max_tokens: {max_tokens} # the longest row that was looked at has {lengths.longest}{cut}",
        "train_defaults:",
        f"  batch_size: {steps}",
        f"  micro_batch_size: {steps}",
        f"  epochs: {1 if len(records) >= 1000 else 3}",
    ]
    if sum(file.stat().st_size for file in base.glob("*.safetensors")) < SMALL_BYTES:
        lines.append("  learning_rate: 3.0e-3 # for a base as small as this one")
    lines.append("train: # an adapter (by default qlora) and an objective (by default sft) for each method")
    for objective, method in methods:
        lines.append(f"  {method}: {{}}" if objective == "sft" else f"  {method}: {{objective: {{name: {objective}}}}}")
    lines += [
        "merge: {}",
        f"evaluate: {{max_new_tokens: {new_tokens}}}",
        f"register: {{model: {name}}}",
        f"promote: {{metric: {'score' if exact else 'loss'}, max_noise: {0.1 if exact else 1.0}}}"
        + (" # exact match" if exact else " # nats a token; long replies are never equal to their targets"),
    ]
    return "\n".join(lines) + "\n"


def _reply_words(records: Sequence[Record]) -> list[int]:
    replies = []
    for record in records:
        if isinstance(record, ChatExample):
            replies.append(record.messages[-1].content)
        elif isinstance(record, PreferencePair):
            replies.append(record.chosen)
        elif isinstance(record, LabelledReply):
            replies.append(record.reply)
    return [len(reply.split()) if reply.isascii() else len(reply) // 2 for reply in replies]


def _path(path: Path, workspace: Path) -> str:
    """Return a path as params.yaml has it, relative to the workspace where it lies within, quoted."""
    whole, root = path.resolve(), workspace.resolve()
    return json.dumps(str(whole.relative_to(root) if whole.is_relative_to(root) else whole), ensure_ascii=False)


def _name(source: Path) -> str:
    """Return a name for the source and the model, of what a key of params may be made of."""
    return re.sub(r"[^a-z0-9]+", "-", source.stem.lower()).strip("-")[:40] or "mine"
