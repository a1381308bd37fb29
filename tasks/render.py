"""Renders clean rows to token ids and loss masks, and splits them.

Reads:  data/clean/ (chat, preference), the tokenizer of data/base/.
Writes: data/rendered/{train,held_out}/chat.parquet (id, family, ids, mask, prompt_tokens) and preference.parquet (id,
        family,
        prompt_ids, chosen_ids, rejected_ids), manifest.json (counts, tokens, template digest).
Params: render
Fails:  a row with nothing to learn, a template that does not fit (65, never retried).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks import process
from tasks.errors import BadData
from tasks.outputs import read_manifest, whole_folder
from tasks.params import Render
from tasks.progress import Progress
from tasks.records import ChatExample, PreferencePair, Record, held_out
from tasks.tables import read_records, write_rows
from tasks.templates import load_tokenizer, render_chat, render_prompt, render_reply, template_digest

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "held_out")


def rendered_schema(kind: str) -> pa.Schema:
    """The columns of rendered rows: token ids as int32, the loss mask as booleans of the same length."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    own = {
        "chat": [("ids", ids), ("mask", pa.list_(pa.bool_())), ("prompt_tokens", pa.int32())],
        "preference": [("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids)],
    }[kind]
    return pa.schema([("id", pa.string()), ("family", pa.string()), *own])


class TooLong(Exception):
    """A row that is longer than `render.max_tokens` and is to be dropped."""


def render_rows(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, params: Render
) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], dict[str, int]]:
    """Renders rows and puts each on its side of the split.

    Returns:
        The rendered rows by (split, kind), and the counts: rows truncated and rows dropped for their length.

    Raises:
        BadData: rows that have nothing to learn or that the template does not fit; all of them are named.
    """
    rendered: dict[tuple[str, str], list[dict[str, Any]]] = {(s, k): [] for s in SPLITS for k in ("chat", "preference")}
    counts = {"truncated": 0, "dropped": 0}
    refused = []
    for record in records:
        try:
            row, truncated = _render(record, tokenizer, params)
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
            fix="correct or remove these rows, or choose another render.max_tokens or render.too_long",
        )
    return rendered, counts


def _render(record: Record, tokenizer: PreTrainedTokenizerBase, params: Render) -> tuple[dict[str, Any], bool]:
    limit = params.max_tokens
    if isinstance(record, ChatExample):
        ids, mask, prompt_tokens = render_chat(tokenizer, record.messages)
        _check_length(len(ids), params)
        if not any(mask[:limit]):
            raise BadData(
                "its prompt fills render.max_tokens, so nothing is left to learn", got=f"{prompt_tokens} tokens"
            )
        return {"ids": ids[:limit], "mask": mask[:limit], "prompt_tokens": prompt_tokens}, len(ids) > limit
    if isinstance(record, PreferencePair):
        prompt = render_prompt(tokenizer, record.prompt)
        chosen, rejected = (render_reply(tokenizer, record.prompt, reply) for reply in (record.chosen, record.rejected))
        longest = len(prompt) + max(len(chosen), len(rejected))
        _check_length(longest, params)
        room = limit - len(prompt)
        if room < 1 or chosen[:room] == rejected[:room]:
            raise BadData(
                "within render.max_tokens chosen and rejected are the same", got=f"prompt of {len(prompt)} tokens"
            )
        return {"prompt_ids": prompt, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}, longest > limit
    raise TypeError(f"no rendering for rows of kind {record.kind}")


def _check_length(tokens: int, params: Render) -> None:
    if tokens <= params.max_tokens or params.too_long == "truncate":
        return
    if params.too_long == "drop":
        raise TooLong
    raise BadData("is longer than render.max_tokens", got=f"{tokens} tokens")


def main() -> None:
    """The stage `render`."""
    with process.stage(__doc__, "clean", "base", "out") as stage:
        read_manifest(stage.path("clean"))
        tokenizer = load_tokenizer(stage.path("base"))
        records = list(read_records(stage.path("clean"), ("chat", "preference")))
        with Progress("render", len(records), "rows") as progress:
            rendered, counts = render_rows(progress.over(records), tokenizer, stage.params.render)
        about: dict[str, Any] = {**counts, "template_sha256": template_digest(tokenizer)}
        with whole_folder(stage.path("out"), about) as folder:
            for (split, kind), rows in rendered.items():
                (folder / split).mkdir(exist_ok=True)
                write_rows(folder / split / f"{kind}.parquet", rows, rendered_schema(kind))
                about[f"{split}_{kind}_rows"] = len(rows)
        summary = ", ".join(f"{len(rows)} {split} {kind}" for (split, kind), rows in rendered.items())
        print(
            f"render: {summary}; {counts['truncated']} truncated, {counts['dropped']} dropped as too long", flush=True
        )


if __name__ == "__main__":
    main()
