"""Forgetting by tuning: the loss on an unrelated text, before and after."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from tasks.core.errors import BadData, BadParams, Diverged
from tasks.evaluate.answer_cache import BATCHES
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.questions import check_digest
from tasks.evaluate.suite_params import GeneralText
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.device import host_read
from tasks.readers.files import read_rows_of

WINDOW_TOKENS = 512
"""What is read at a time, at most, and at most half of what the model can: a soft prompt takes its place before it.

Windows overlap by one token, so that each token but the first is predicted once.
"""


class TextLoss(NamedTuple):
    """The loss on a text, nats per token, over `tokens` predicted tokens."""

    loss: float
    tokens: int


def general_loss(examinee: ModelUnderTest, text: GeneralText) -> TextLoss:
    """Compute the loss of a model on the beginning of a general text.

    Raises:
        BadParams: the model is an encoder-decoder, which has no loss on a text alone.
        BadData: the file is missing, is not the one that was pinned, or holds too little.
        Diverged: the loss is not finite.
    """
    if examinee.encodes:
        raise BadParams("an encoder-decoder has no loss on a text alone", where="evaluate.general_text", fix="none")
    windows = _windows(examinee, text)
    batch, logp = examinee.params.batch_size, 0.0
    for start in range(0, len(windows), BATCHES * batch):
        some = windows[start : start + BATCHES * batch]
        logp += examinee.recall(["general_text", some], partial(_logp, examinee, some, batch), partial(_read, some))
    tokens = sum(len(window) - 1 for window in windows)
    loss = -logp / tokens
    if not 0 <= loss < float("inf"):
        raise Diverged("the loss on the general text is no number", where=text.path, got=f"{loss} nats per token")
    return TextLoss(loss, tokens)


def _windows(examinee: ModelUnderTest, text: GeneralText) -> list[list[int]]:
    path = Path(text.path)
    check_digest(path, text.sha256)
    ids: list[int] = []
    for row in read_rows_of(path):
        if not isinstance(row.value, dict) or not isinstance(row.value.get("text"), str):
            raise BadData("has no column `text`", where=f"{row.file}:{row.number}")
        ids += examinee.tokenizer(row.value["text"], verbose=False)["input_ids"]
        if len(ids) >= text.max_tokens:
            break
    ids = ids[: text.max_tokens]
    if len(ids) < 2:
        raise BadData("holds too little text", where=text.path, got=f"{len(ids)} tokens")
    size = int(min(WINDOW_TOKENS, examinee.room // 2))
    return [ids[start : start + size] for start in range(0, len(ids) - 1, size - 1)]


def _logp(examinee: ModelUnderTest, windows: list[list[int]], batch_size: int) -> float:
    import torch

    total = 0.0
    for start in range(0, len(windows), batch_size):
        rows = [TokenRow(ids, [False] + [True] * (len(ids) - 1), 1) for ids in windows[start : start + batch_size]]
        with torch.no_grad():
            logp = score_tokens(examinee.model, rows).logp.double().sum()
        with host_read("the log-probability of a batch"):
            total += logp.item()
    return total


def _read(windows: list[list[int]], _: float) -> int:
    return sum(map(len, windows))
