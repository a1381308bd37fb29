"""Tokenizers: loading, encoding many texts at once, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tasks.core.errors import BadData, BadModel
from tasks.tokenization.tokenizer_steps import check_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RowT = TypeVar("RowT")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, with or without a chat template.

    Raises:
        BadModel: it is not there, does not load, makes too much of a text, or loses text.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise BadModel(
            "there is no such tokenizer",
            where=str(folder),
            got="a file" if folder.exists() else "no folder",
            expected="a model folder, with tokenizer.json and tokenizer_config.json",
            fix="correct the path; a tokenizer of the hub is fetched first, with `hf download NAME --local-dir FOLDER`",
        )
    check_steps(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the loader raises whatever its parsers raise
        raise BadModel(
            "its tokenizer does not load", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0]
        ) from error
    if tokenizer.is_fast:  # what a training once saved would cut every text, or fill it up
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    _check_keeps_text(tokenizer, folder)
    return tokenizer


_SENTENCE = "The quick brown fox jumps over 12 lazy dogs."
_WORDS_TRIED = 32


def _check_keeps_text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer that loses text: what it encodes of a sentence must say the sentence, but for case and space.

    A vocabulary need not be of English, or of a language at all: one that has no such words must keep words of its own.
    Without its files a tokenizer loads with an empty vocabulary, and every text becomes nothing.
    """
    tried = chain([_SENTENCE], _own_words(tokenizer))  # these are looked up only where the sentence does not do
    if any(_letters(_there_and_back(tokenizer, text)) == _letters(text) for text in tried):
        return
    became = _there_and_back(tokenizer, _SENTENCE)
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".tiktoken"))
    raise BadModel(
        "its tokenizer loses text",
        where=str(folder),
        got=f"a vocabulary of {len(tokenizer)}, by which {_SENTENCE!r} becomes {became!r}",
        expected="tokenizer.json, or the files that its tokenizer_class reads",
        examples=[f"there is {name}" for name in there],
        fix="save it with transformers where it works: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
    )


def _there_and_back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return what the tokens of a text say, or that they cannot be told."""
    try:
        (ids,) = encode(tokenizer, [text])
    except Exception as error:  # what the library raises for a character that no token stands for
        return f"{type(error).__name__}: {error}"
    return str(tokenizer.decode(ids))


def _own_words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield some texts that tokens of a vocabulary stand for, without those that were added to it."""
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()))
    for token in ordinary[-_WORDS_TRIED:]:
        if text := str(tokenizer.decode([token])).strip():
            yield text


def _letters(text: str) -> str:
    """Return a text without its white space and case."""
    return "".join(text.casefold().split())


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode token ids into text, without control tokens and white space around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of many texts at once, without any that the template did not write."""
    if not texts:
        return []
    if tokenizer.is_fast:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[str] | BadData],
    encode: Callable[[PreTrainedTokenizerBase, Sequence[Sequence[str]]], list[list[list[int]] | BadData]],
    made_of: Callable[[list[list[int]]], RowT],
) -> list[RowT | BadData]:
    """Build something of the tokens of each row's texts; a row that has a reason instead keeps it."""
    tokens = iter(encode(tokenizer, [row for row in texts if not isinstance(row, BadData)]))
    found = [row if isinstance(row, BadData) else next(tokens) for row in texts]
    return [row if isinstance(row, BadData) else made_of(row) for row in found]


def encode_pieces(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]) -> list[list[list[int]] | BadData]:
    """Encode each piece of each row, such that a row's tokens are those that serving sees piece by piece."""
    if _may_be_cut(tokenizer):
        flat = iter(encode(tokenizer, [piece for row in rows for piece in row]))
        return [[next(flat) for _ in row] for row in rows]
    flat = iter(encode(tokenizer, [text for row in rows for text in accumulate(row)]))
    return [_differences([next(flat) for _ in row]) for row in rows]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]
) -> list[list[list[int]] | BadData]:
    """Encode rows of a prompt and several replies: each reply as it is when it alone stands with the prompt."""
    if _may_be_cut(tokenizer):
        return encode_pieces(tokenizer, rows)
    alone = [[row[0], reply] for row in rows for reply in row[1:]]
    flat = iter(encode_pieces(tokenizer, alone))
    result: list[list[list[int]] | BadData] = []
    for row in rows:
        found = [next(flat) for _ in row[1:]]
        wrong = next((each for each in found if isinstance(each, BadData)), None)
        good = [each for each in found if not isinstance(each, BadData)]
        result.append(wrong or [good[0][0], *(each[1] for each in good)])
    return result


def _differences(prefixes: list[list[int]]) -> list[list[int]] | BadData:
    """Return what each prefix adds to the one before."""
    pieces, before = [], list[int]()
    for ids in prefixes:
        if ids[: len(before)] != before:
            return BadData("the prompt's tokens change when it is answered, so no loss mask can be told")
        pieces.append(ids[len(before) :])
        before = ids
    return pieces


def _may_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether pieces' tokens are the whole's: not where the beginning of each text gets a separate mark."""
    known: bool | None = getattr(tokenizer, "_temper_may_be_cut", None)
    if known is None:
        first, second = encode(tokenizer, ["x", "y"])
        known = str(tokenizer.decode(first + second)) == "xy"
        tokenizer._temper_may_be_cut = known
    return known
