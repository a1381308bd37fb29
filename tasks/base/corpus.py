"""Rows to pretrain on: which are trained on and which are held out, as token ids, and packed into blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tasks.base.params import Pretraining
from tasks.core.errors import BadData, BadModel
from tasks.core.parquet import read_records
from tasks.core.records import ChatExample, TextExample, held_out
from tasks.tokenization.chat_template import Chat, render_chats

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Document: TypeAlias = TextExample | ChatExample

DOCUMENTS_AT_ONCE = 10_000
"""Documents that are tokenised together."""


class Corpus(NamedTuple):
    """Rows to learn from, and rows that the perplexity is measured on; both in the order of the files."""

    train: list[Document]
    held_out: list[Document]


def read_corpus(params: Pretraining) -> Corpus:
    """Read the clean rows of the kinds that params list; a held-out group is never trained on.

    Raises:
        BadData: there are no rows to train on.
    """
    if missing := [kind for kind in params.rows if not Path(params.path, f"{kind}.parquet").is_file()]:
        raise BadData(
            "is not the folder of clean rows",
            where=params.path,
            got=f"no {missing[0]}.parquet",
            fix="set base.path=data/clean",
        )
    corpus = Corpus([], [])
    for record in read_records(Path(params.path), params.rows):
        if isinstance(record, TextExample | ChatExample):
            kept = held_out(record.split_group(), params.held_out)
            (corpus.held_out if kept else corpus.train).append(record)
    if not corpus.train:
        raise BadData(
            "there are no rows to pretrain on",
            where=params.path,
            got=f"{len(corpus.held_out)} held-out rows and no others",
            expected=f"rows of kind {' or '.join(params.rows)}",
            fix="add such a source, or change base.rows or base.held_out",
        )
    del corpus.held_out[params.held_out_rows :]
    return corpus


def text_bytes(documents: Iterable[Document]) -> int:
    """Count the bytes of UTF-8 in documents' texts, whatever a tokenizer or a template makes of them."""
    return sum(
        len(text.encode())
        for document in documents
        for text in ([document.text] if isinstance(document, TextExample) else [m.content for m in document.messages])
    )


def own_token_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[list[int]]:
    """Yield documents as an existing model reads them: with its tokenizer's prefix of a text, up to a stop token.

    A chat is rendered as it is for tuning, up to the end of its last reply.

    Raises:
        BadModel: the tokenizer has no stop token, or there are chats and it has no chat template.
        BadData: chats that the template does not fit.
    """
    stop = tokenizer.eos_token_id
    if stop is None:
        raise BadModel("its tokenizer has no stop token to end a text with", fix="set eos_token in its tokenizer")
    if not tokenizer.chat_template and any(isinstance(document, ChatExample) for document in documents):
        raise BadModel(
            "its tokenizer has no chat template, and chats are to be trained on",
            fix="name a template of data/templates in base.of.template, or leave chat out of base.rows",
        )
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = documents[start : start + DOCUMENTS_AT_ONCE]
        texts = [document.text for document in some if isinstance(document, TextExample)]
        rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        ended = (row if row and row[-1] == stop else [*row, stop] for row in rows)
        chats = iter(_chat_ids(tokenizer, [document for document in some if isinstance(document, ChatExample)]))
        yield from (next(ended if isinstance(document, TextExample) else chats) for document in some)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chats: Sequence[ChatExample]) -> list[list[int]]:
    ids, refused = [], []
    for chat, rendered in zip(chats, render_chats(tokenizer, [Chat(c.messages, c.tools) for c in chats]), strict=True):
        if isinstance(rendered, BadData):
            refused.append(f"{chat.id}: {rendered.what}")
        else:
            ids.append(rendered.ids)
    if refused:
        raise BadData(
            f"{len(refused)} chats cannot be rendered", examples=refused, fix="correct them, or change base.rows"
        )
    return ids


def pack_blocks(rows: Iterable[Sequence[int]], context_tokens: int) -> np.ndarray[Any, Any]:
    """Pack all rows end to end into blocks: (blocks, context_tokens), int32; the rest at the end is dropped.

    Raises:
        BadData: there is not one block's worth of text.
    """
    import numpy as np

    ids = array("i")
    for row in rows:
        ids.extend(row)
    blocks = len(ids) // context_tokens
    if not blocks:
        raise BadData("too little text to pretrain on", got=f"{len(ids)} tokens", expected=f"at least {context_tokens}")
    return np.frombuffer(ids, dtype=np.int32)[: blocks * context_tokens].reshape(blocks, context_tokens)
