"""Answers to a file of prompts, and the log-probabilities of targets that it has: Parquet in, Parquet out.

A row holds `messages` (a list of role and content), or `prompt` (a text, as a user says it), or `input` (a text that an
encoder-decoder model reads); with `target`, it is also told how likely that reply is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.artifacts import atomic_file
from tasks.core.errors import BadData
from tasks.core.progress import Progress
from tasks.core.records import Message, conversation
from tasks.inference.continuations import each_continuation
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.logprobs import score_rows
from tasks.inference.params import GREEDY, Generation
from tasks.inference.rendered_rows import Row
from tasks.inference.rows import TokenRow
from tasks.models.device import host_read
from tasks.models.loader import Model
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_of
from tasks.tokenization.chat_template import render_prompt, render_reply
from tasks.tokenization.tokenizer import decode

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

ASKED = ("messages", "prompt", "input")
TARGET = "target"
WRITTEN = ("reply", "finish_reason", "target_logp", "target_tokens")
"""The columns that are added; the last two where the file has targets."""

_WINDOW = 16
"""So many batches are read at once, and put into batches by length."""


class PredictionSummary(NamedTuple):
    """Results for one row; `target_logp` in nats, the sum over `target_tokens`."""

    reply: str
    finish_reason: str
    target_logp: float | None
    target_tokens: int | None


def score_file(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    target: Path,
    *,
    max_tokens: int,
    batch_size: int,
    generation: Generation = GREEDY,
) -> int:
    """Answers every row of a Parquet file; the result appears whole or not at all.

    Args:
        model: a decoder or an encoder-decoder.
        tokenizer: its own.
        source: the file to read.
        target: the file to write: all columns of the source, and those of WRITTEN.
        max_tokens: a reply is at most so long.
        batch_size: rows in a forward pass.
        generation: how replies are generated.

    Returns:
        How many rows there were.

    Raises:
        BadData: the file is no Parquet file, lacks the columns, or has a row that cannot be asked; nothing is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise BadData("is no Parquet file", where=str(source), got=str(error).split("\n")[0]) from error
    with file, Progress("score", file.metadata.num_rows, "rows") as progress:
        column = _asked(file.schema_arrow.names, model, source)
        schema = _schema(file.schema_arrow)
        row = 0
        with atomic_file(target) as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
            for block in file.iter_batches(batch_size=_WINDOW * batch_size):
                rows = block.to_pylist()
                prepared = [
                    _prepared(model, tokenizer, each, column, f"{source}, row {row + n}")
                    for n, each in enumerate(rows, 1)
                ]
                told = _answered(model, tokenizer, prepared, max_tokens, batch_size, generation, progress)
                made = [{**each, **said._asdict()} for each, said in zip(rows, told, strict=True)]
                writer.write_table(pa.Table.from_pylist([{n: r[n] for n in schema.names} for r in made], schema=schema))
                row += len(rows)
    return row


def _asked(names: Sequence[str], model: Model, source: Path) -> str:
    """Choose the column to answer.

    Raises:
        BadData: there is none that this model reads, or one has the name of a column that is written.
    """
    wanted = ("input", "prompt") if architecture_of(model) is ENCODER_DECODER else ("messages", "prompt")
    found = [name for name in wanted if name in names]
    if not found:
        raise BadData(
            "has no column to ask", where=str(source), got=", ".join(names), expected=f"a column {' or '.join(wanted)}"
        )
    if taken := [name for name in WRITTEN if name in names]:
        raise BadData(
            "has columns already that would be written", where=str(source), examples=taken, fix="rename or drop them"
        )
    return found[0]


def _schema(given: pa.Schema) -> pa.Schema:
    import pyarrow as pa

    types = dict(zip(WRITTEN, (pa.string(), pa.string(), pa.float64(), pa.int32()), strict=True))
    added = WRITTEN if TARGET in given.names else WRITTEN[:2]
    return pa.schema([*given, *((name, types[name]) for name in added)])


class _Prepared(NamedTuple):
    """A row as tokens: what is asked, and what is scored, if anything."""

    prompt: list[int]
    scored: Row | None


def _prepared(
    model: Model, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], column: str, where: str
) -> _Prepared:
    asked, target = row[column], row.get(TARGET)
    if not asked:
        raise BadData(f"its {column} is empty", where=where, fix="fill it in, or drop the row")
    if architecture_of(model) is ENCODER_DECODER:
        ids = list(tokenizer(asked)["input_ids"])
        return _Prepared(ids, None if target is None else PairRow(ids, list(tokenizer(target)["input_ids"])))
    try:
        turns = [Message("user", asked)] if column == "prompt" else conversation(asked)
        ids = render_prompt(tokenizer, turns)
        reply = None if target is None else render_reply(tokenizer, turns, target)
    except BadData as error:
        raise BadData(error.what, where=where, got=error.got, expected=error.expected, fix=error.fix) from error
    if reply is None:
        return _Prepared(ids, None)
    return _Prepared(ids, TokenRow([*ids, *reply], [False] * len(ids) + [True] * len(reply), len(ids)))


def _answered(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[_Prepared],
    max_tokens: int,
    batch_size: int,
    generation: Generation,
    progress: Progress,
) -> list[PredictionSummary]:
    """Generate the replies to some rows, in their order; rows of like length are answered together."""
    prompts = [row.prompt for row in rows]
    replies = list[list[int]]([[]]) * len(rows)
    for place, new in each_continuation(model, tokenizer, prompts, max_tokens, generation, rows=batch_size):
        replies[place] = new
        progress.step()
    found: dict[int, PredictionSummary] = {}
    for places in _batches(rows, batch_size):
        for place, (logp, tokens) in zip(places, _logps(model, [rows[place].scored for place in places]), strict=True):
            ended = "stop" if tokenizer.eos_token_id in replies[place] else "length"
            found[place] = PredictionSummary(decode(tokenizer, replies[place]), ended, logp, tokens)
    return [found[place] for place in range(len(rows))]


def _batches(rows: Sequence[_Prepared], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda place: (len(rows[place].prompt), place))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _logps(model: Model, rows: Sequence[Row | None]) -> list[tuple[float | None, int | None]]:
    """Compute each row's log-probability and its number of tokens; None for a row without a target."""
    import torch

    asked = [row for row in rows if row is not None]
    if not asked:
        return [(None, None)] * len(rows)
    with torch.no_grad():
        scored = score_rows(model, asked)
    with host_read("the log-probabilities of a batch"):
        told = iter(zip(scored.row_sums().tolist(), scored.tokens, strict=True))
    return [(None, None) if row is None else next(told) for row in rows]
