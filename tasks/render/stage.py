"""Renders clean rows to token ids and loss masks, and splits them.

Reads:  data/clean/ (chat, preference, labelled, pair), the tokenizer of data/base/.
Writes: data/rendered/{train,held_out}/ (every file with id, family): chat.parquet (ids, mask, prompt_tokens),
        preference.parquet (prompt_ids, chosen_ids, rejected_ids), labelled.parquet (prompt_ids, reply_ids, label),
        pair.parquet (input_ids, target_ids); manifest.json (counts, lengths, tokens per epoch, template's
        digest).
Params: render
Fails:  a row with nothing to learn, a template that does not fit, rows that this kind of base cannot learn (65, never
        retried).
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.artifacts import atomic_folder, read_manifest
from tasks.core.errors import BadData
from tasks.core.parquet import read_records, write_rows
from tasks.core.progress import Progress
from tasks.core.records import ChatExample, LabelledReply, PreferencePair, Record, SeqPair, held_out
from tasks.core.stage import run_stage
from tasks.render.params import Render
from tasks.tokenization.architecture import ENCODER_DECODER, Architecture, architecture_in
from tasks.tokenization.chat_template import (
    Chat,
    load_tokenizer,
    template_digest,
    texts_of_chats,
    texts_of_replies,
    tokens_of_chats,
    tokens_of_replies,
)
from tasks.tokenization.template_form import reasoning_kept

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "held_out")
RENDERED = ("chat", "preference", "labelled", "pair")
"""The kinds of rows that are rendered; plain texts are for pretraining, which has no template."""

ROWS_AT_ONCE = 256
"""Rows whose texts are tokenised together."""

BATCHES_AHEAD = 3
"""Batches of rows that are on their way: at the template, at the tokenizer, and ready."""


def rendered_schema(kind: str) -> pa.Schema:
    """Return the columns of rendered rows: token ids as int32, the loss mask as booleans of the same length."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    own = {
        "chat": [("ids", ids), ("mask", pa.list_(pa.bool_())), ("prompt_tokens", pa.int32())],
        "preference": [("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids)],
        "labelled": [("prompt_ids", ids), ("reply_ids", ids), ("label", pa.bool_())],
        "pair": [("input_ids", ids), ("target_ids", ids)],
    }[kind]
    return pa.schema([("id", pa.string()), ("family", pa.string()), *own])


class TooLong(Exception):
    """A row that is longer than `render.max_tokens` and is to be dropped."""


def render_rows(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, params: Render
) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], dict[str, int]]:
    """Render rows and put each on its side of the split.

    Returns:
        The rendered rows by (split, kind), and the counts: rows truncated and rows dropped for their length.

    Raises:
        BadData: rows without target tokens or that the template does not fit; all of them are named.
    """
    rendered: dict[tuple[str, str], list[dict[str, Any]]] = {(s, k): [] for s in SPLITS for k in RENDERED}
    counts = {"truncated": 0, "dropped": 0}
    refused = []
    for record, tokens in _tokens_of(iter(records), tokenizer, params):
        try:
            if isinstance(tokens, BadData):
                raise tokens
            row, truncated = _fit(record, tokens, params)
        except TooLong:
            counts["dropped"] += 1
            continue
        except BadData as error:
            refused.append(f"{record.id}: {error.what}" + (f" ({error.got})" if error.got else ""))
            continue
        counts["truncated"] += truncated
        split = "held_out" if held_out(record.split_group(), params.held_out) else "train"
        rendered[split, record.kind].append({"id": record.id, "family": record.family, **row})
    if refused:
        raise BadData(
            f"{len(refused)} rows cannot be rendered",
            examples=refused,
            fix="correct or remove these rows, or choose another render.max_tokens, render.too_long or render.loss_on",
        )
    return rendered, counts


def _tokens_of(
    records: Iterator[Record], tokenizer: PreTrainedTokenizerBase, params: Render
) -> Iterator[tuple[Record, Any]]:
    """Yield every row with its tokens, or with the reason that it has none.

    Three things go on at once: the template's worker makes texts of some rows, the tokenizer tokens of the texts of
    those before, and whoever iterates takes the tokens of those before these.
    """
    waiting: deque[Future[Iterator[tuple[Record, Any]]]] = deque()
    with ThreadPoolExecutor(1) as templates, ThreadPoolExecutor(1) as tokenizers:
        while some := list(islice(records, ROWS_AT_ONCE)):
            texts = templates.submit(_texts, tokenizer, some, params)
            waiting.append(tokenizers.submit(_tokenised, tokenizer, some, texts))
            if len(waiting) > BATCHES_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class _Texts(NamedTuple):
    """What the template made of some rows: by kind, their places and their texts."""

    places: Mapping[str, Sequence[int]]
    texts: Mapping[str, Any]


def _texts(tokenizer: PreTrainedTokenizerBase, some: Sequence[Record], params: Render) -> _Texts:
    places = {kind: [n for n, record in enumerate(some) if record.kind == kind] for kind in RENDERED}
    return _Texts(
        places, {kind: _HALVES[kind].texts(tokenizer, [some[n] for n in places[kind]], params) for kind in RENDERED}
    )


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, some: Sequence[Record], made: Future[_Texts]
) -> Iterator[tuple[Record, Any]]:
    places, texts = made.result()
    tokens: dict[int, Any] = {}
    for kind in RENDERED:
        tokens |= zip(places[kind], _HALVES[kind].tokens(tokenizer, texts[kind]), strict=True)
    return zip(some, (tokens[place] for place in range(len(some))), strict=True)


class Halves(NamedTuple):
    """Two steps from rows of a kind to tokens: the template's, and the tokenizer's."""

    texts: Callable[[PreTrainedTokenizerBase, Sequence[Any], Render], Any]
    tokens: Callable[[PreTrainedTokenizerBase, Any], Iterable[Any]]


def _chats(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], params: Render) -> Any:
    chats = [Chat(reasoning_kept(row.messages, params.reasoning), row.tools) for row in rows]
    return texts_of_chats(tokenizer, chats, params.loss_on)


def _preferences(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], params: Render) -> Any:
    prompts = [prompt_of(row, params) for row in rows]
    return texts_of_replies(tokenizer, prompts, [(row.chosen, row.rejected) for row in rows])


def _labelled(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], params: Render) -> Any:
    return texts_of_replies(tokenizer, [prompt_of(row, params) for row in rows], [(row.reply,) for row in rows])


def prompt_of(row: PreferencePair | LabelledReply, params: Render) -> Chat:
    """Build the prompt of replies, whose own turns are all earlier ones."""
    earlier = "keep" if params.reasoning == "keep" else "drop"
    return Chat(reasoning_kept(row.prompt, earlier), row.tools)


def tokens_of_pairs(tokenizer: PreTrainedTokenizerBase, rows: Sequence[SeqPair]) -> Iterable[Any]:
    """Tokenise pairs for encoder-decoders: both sides as the tokenizer itself ends them, without a chat template."""
    if not rows:
        return ()
    inputs = tokenizer([row.input for row in rows])["input_ids"]
    return zip(inputs, tokenizer(text_target=[row.target for row in rows])["input_ids"], strict=True)


_HALVES = {
    "chat": Halves(_chats, tokens_of_chats),
    "preference": Halves(_preferences, tokens_of_replies),
    "labelled": Halves(_labelled, tokens_of_replies),
    "pair": Halves(lambda tokenizer, rows, params: rows, tokens_of_pairs),
}


def _fit(record: Record, tokens: Any, params: Render) -> tuple[dict[str, Any], bool]:
    """Build the row that is written, cut where it must be, and return whether it was."""
    limit = params.max_tokens
    if isinstance(record, ChatExample):
        ids, mask, prompt_tokens = tokens
        _check_length(len(ids), params)
        if not any(mask[:limit]):
            raise BadData(
                "its prompt fills render.max_tokens, so nothing is left to learn", got=f"{prompt_tokens} tokens"
            )
        return {"ids": ids[:limit], "mask": mask[:limit], "prompt_tokens": prompt_tokens}, len(ids) > limit
    if isinstance(record, SeqPair):
        given, wanted = tokens
        longest = max(len(given), len(wanted))
        _check_length(longest, params)
        if not record.target.strip():  # its end token alone is left
            raise BadData("its target is empty, so there is nothing to learn")
        read = given if len(given) <= limit else given[: limit - 1] + given[-1:]  # an encoder is used to its end token
        return {"input_ids": read, "target_ids": wanted[:limit]}, longest > limit
    prompt, replies = tokens
    longest = len(prompt) + max(map(len, replies))
    _check_length(longest, params)
    room = limit - len(prompt)
    cut = [reply[: max(room, 0)] for reply in replies]
    if isinstance(record, LabelledReply):
        if not cut[0]:
            raise BadData(
                "its prompt fills render.max_tokens, so nothing is left to learn", got=f"{len(prompt)} tokens"
            )
        return {"prompt_ids": prompt, "reply_ids": cut[0], "label": record.label}, longest > limit
    if isinstance(record, PreferencePair):
        if room < 1 or cut[0] == cut[1]:
            raise BadData(
                "within render.max_tokens chosen and rejected are the same", got=f"prompt of {len(prompt)} tokens"
            )
        return {"prompt_ids": prompt, "chosen_ids": cut[0], "rejected_ids": cut[1]}, longest > limit
    raise TypeError(f"no rendering for rows of kind {record.kind}")


def _check_length(tokens: int, params: Render) -> None:
    if tokens <= params.max_tokens or params.too_long == "truncate":
        return
    if params.too_long == "drop":
        raise TooLong
    raise BadData("is longer than render.max_tokens", got=f"{tokens} tokens")


def check_kinds(records: Iterable[Record], base: Architecture) -> None:
    """Refuse rows that a kind of base cannot be trained on, before any is rendered.

    A decoder's pairs may lie beside rows that it is trained on, but not alone.

    Raises:
        BadData: chats, preferences or labelled replies for an encoder-decoder; nothing but pairs for a decoder.
    """
    found = Counter(record.kind for record in records)
    if base is ENCODER_DECODER:
        wrong = {kind: count for kind, count in found.items() if kind != base.rows}
    else:
        wrong = dict(found) if set(found) == {ENCODER_DECODER.rows} else {}
    if wrong:
        forms = {"chat": "chats, {prompt: ..., reply: ...}", "pair": "inputs and targets, {input: ..., target: ...}"}
        raise BadData(
            f"the base is of the kind {base.name}, which cannot learn these rows",
            where="data/clean",
            got=", ".join(f"{count} {kind} rows" for kind, count in sorted(wrong.items())),
            expected=forms[base.rows],
            fix="give the source such a format, or choose another base",
        )


def length_report(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """Report the lengths of one kind's rows, and the tokens of an epoch."""
    columns = [name for name in rendered_schema(kind).names if name == "ids" or name.endswith("_ids")]
    lengths = sorted(sum(len(row[name]) for name in columns) for row in rows)
    if not lengths:
        return {"rows": 0, "tokens": 0}
    at = {f"p{share}": lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in (50, 90, 99)}
    about: dict[str, Any] = {"rows": len(rows), "tokens": sum(lengths), **at, "longest": lengths[-1]}
    if kind == "chat":
        about["target_tokens"] = sum(sum(row["mask"]) for row in rows)
    return about


def main() -> None:
    """Run the stage `render`."""
    with run_stage(__doc__, "clean", "base", "out") as stage:
        clean = read_manifest(stage.path("clean"))
        params = stage.section("render", Render)
        tokenizer = load_tokenizer(stage.path("base"))
        records = list(read_records(stage.path("clean"), RENDERED))
        check_kinds(records, architecture_in(stage.path("base")))
        gc.freeze()  # or the collector would look through all of them again and again
        with Progress("render", len(records), "rows") as progress:
            rendered, counts = render_rows(progress.over(records), tokenizer, params)
        about: dict[str, Any] = {
            **counts,
            "template_sha256": template_digest(tokenizer),
            "contamination_ngram": clean["contamination_ngram"],
        }
        with atomic_folder(stage.path("out"), about) as folder:
            for (split, kind), rows in rendered.items():
                (folder / split).mkdir(exist_ok=True)
                write_rows(folder / split / f"{kind}.parquet", rows, rendered_schema(kind))
                about.setdefault(split, {})[kind] = length_report(rows, kind)
        summary = ", ".join(f"{len(rows)} {split} {kind}" for (split, kind), rows in rendered.items() if rows)
        print(
            f"render: {summary}; {counts['truncated']} truncated, {counts['dropped']} dropped as too long", flush=True
        )
