"""A larger vocabulary for an existing model: new tokens, and rows for them in the embedding and the output head.

Tokens are given as texts, or learned from a corpus by going on with the merges of a byte-pair encoding (Sennrich et al.
2016, arXiv:1508.07909) where its own training stopped. New merges come after all old ones, so that nothing is split
that was whole. What the model made of old tokens stays as it was, to the bit.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import BadData, BadModel
from tasks.tokenization.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORD_START = "\u2581"
"""What SentencePiece writes for the space before a word."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OTHER_FORMS = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""What says again what tokenizer.json says, and would no longer be true."""


class BpeMerge(NamedTuple):
    """Two tokens that become one, by their ids."""

    left: int
    right: int


# --- tokens -----------------------------------------------------------------------------------------------------------


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[int, list[int]]:
    """Add each text as one token to the tokenizer, wherever it stands.

    Returns:
        The new ids, each with the tokens that stood for it before.

    Raises:
        BadModel: a text is a token already, or is given twice.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    taken = [text for place, text in enumerate(texts) if text in known or text in texts[:place]]
    if taken:
        raise BadModel(
            "cannot become new tokens: they are tokens already, or stand twice",
            where="base.growth.tokens",
            examples=taken,
            fix="take them out of the list",
        )
    before = [_ids(tokenizer, text) for text in texts]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    numbers = tokenizer.get_vocab()
    return {numbers[text]: pieces for text, pieces in zip(texts, before, strict=True)}


def add_merges(folder: Path, texts: Iterable[str], count: int) -> dict[int, list[int]]:
    """Add merges to the tokenizer of a model folder, trained on some texts.

    Returns:
        The new ids, each with the tokens that stood for it before.

    Raises:
        BadModel: the tokenizer is no byte-pair encoding that merges can be added to.
        BadData: the texts have too few pairs that occur twice.
    """
    tokenizer = read_tokenizer(folder)
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model: dict[str, Any] = content.get("model", {"type": "a tokenizer of Python code"})
    if model["type"] != "BPE" or model["continuing_subword_prefix"]:
        raise BadModel(
            "merges can only be learned for a byte-pair encoding without prefixes",
            where=str(folder / "tokenizer.json"),
            got=model["type"],
            fix="set base.growth.merges to 0 and give the tokens in base.growth.tokens",
        )
    # added tokens become part of the encoding's own vocabulary: their ids would else move behind it when it grows
    model["vocab"] |= {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    merges = learn_merges(_words(tokenizer, texts), model["vocab"], len(tokenizer), count)
    names = {number: token for token, number in model["vocab"].items()}
    pieces: dict[int, list[int]] = {}
    for new, (left, right) in enumerate(merges, len(tokenizer)):
        names[new] = names[left] + names[right]
        model["vocab"][names[new]] = new
        model["merges"].append([names[left], names[right]])
        pieces[new] = [*pieces.get(left, [left]), *pieces.get(right, [right])]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name in _OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    grown = read_tokenizer(folder).get_vocab()
    if grown != model["vocab"]:
        raise BadModel("its tokenizer does not keep new merges", where=str(folder), got=type(tokenizer).__name__)
    return pieces


def learn_merges(
    words: Mapping[tuple[int, ...], int], vocabulary: Mapping[str, int], first_new: int, count: int
) -> list[BpeMerge]:
    """Find the pairs that BPE merges next: the most frequent each time, of equals that with lower ids.

    Args:
        words: words as token ids, and how often they occur; pairs are within words.
        vocabulary: all tokens that exist; none is made a second time.
        first_new: the id of the first new token; the others follow.
        count: how many.

    Raises:
        BadData: there are fewer pairs that occur twice.
    """
    names, known = {number: token for token, number in vocabulary.items()}, set(vocabulary)
    pairs = _Pairs(words)
    merges: list[BpeMerge] = []
    while len(merges) < count:
        pair = pairs.most_frequent()
        if pair is None:
            raise BadData(
                "too little text to learn that many tokens from",
                where="base.growth.merges",
                got=f"{len(merges)} pairs of tokens that occur twice",
                expected=str(count),
                fix="lower base.growth.merges",
            )
        merged = names[pair.left] + names[pair.right]
        if merged in known or _BYTE.search(merged):  # a byte that stands for itself is decoded alone
            continue
        new = first_new + len(merges)
        names[new] = merged
        known.add(merged)
        merges.append(pair)
        pairs.merge(pair, new)
    return merges


class _Pairs:
    """Pair counts: how often each two tokens stand side by side, kept up to date while pairs are merged."""

    def __init__(self, words: Mapping[tuple[int, ...], int]) -> None:
        self._words, self._times = [list(word) for word in words], list(words.values())
        self._counts: Counter[BpeMerge] = Counter()
        self._where: defaultdict[BpeMerge, set[int]] = defaultdict(set)
        for number in range(len(self._words)):
            self._count(number, 1)
        self._heap = [(-times, pair) for pair, times in self._counts.items()]
        heapify(self._heap)

    def most_frequent(self) -> BpeMerge | None:
        """Take out the pair that occurs most, at least twice; correct counts that have changed since."""
        while self._heap:
            times, pair = heappop(self._heap)
            now = self._counts[pair]
            if now == -times and now >= 2:
                return pair
            if 2 <= now < -times:
                heappush(self._heap, (-now, pair))
        return None

    def merge(self, pair: BpeMerge, new: int) -> None:
        """Replace the pair by the new token everywhere."""
        for number in list(self._where[pair]):
            self._count(number, -1)
            self._words[number] = _merged(self._words[number], pair, new)
            for made in self._count(number, 1):
                if new in made:
                    heappush(self._heap, (-self._counts[made], made))

    def _count(self, number: int, sign: int) -> list[BpeMerge]:
        found = [BpeMerge(*two) for two in zip(self._words[number], self._words[number][1:], strict=False)]
        for pair in found:
            self._counts[pair] += sign * self._times[number]
            if sign > 0:
                self._where[pair].add(number)
            else:
                self._where[pair].discard(number)
        return found


def _merged(word: Sequence[int], pair: BpeMerge, new: int) -> list[int]:
    out: list[int] = []
    place = 0
    while place < len(word):
        together = tuple(word[place : place + 2]) == pair
        out.append(new if together else word[place])
        place += 2 if together else 1
    return out


def _words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[tuple[int, ...]]:
    """Count the words of some texts as the tokenizer splits them; added tokens end words."""
    words: Counter[tuple[int, ...]] = Counter()
    added, names = set(tokenizer.added_tokens_decoder), {n: token for token, n in tokenizer.get_vocab().items()}
    splits = tokenizer.backend_tokenizer.pre_tokenizer is not None
    remaining = iter(texts)
    while some := list(islice(remaining, 1000)):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)
        for text in range(len(some)):
            word: list[int] = []
            last: int | None = None
            for number, of in zip(encoded["input_ids"][text], encoded.word_ids(text), strict=True):
                apart = not word or of != last or number in added
                if apart or (not splits and _word_ends(names[word[-1]], names[number])):
                    words[tuple(word)] += 1
                    word = []
                if number not in added:
                    word.append(number)
                last = of
            words[tuple(word)] += 1
    return Counter({word: times for word, times in words.items() if len(word) > 1})


def _word_ends(before: str, after: str) -> bool:
    """Return whether a word ends between two tokens of a tokenizer that does not split texts itself.

    It does before a space, and between letters or digits and anything else, as SentencePiece's own training has it.
    """
    left, right = before.strip(WORD_START), after.strip(WORD_START)
    return after.startswith(WORD_START) or (left != "" and left[-1].isalnum() != right[:1].isalnum())


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


# --- rows -------------------------------------------------------------------------------------------------------------


def grow_rows(model: PreTrainedModel, new: Mapping[int, Sequence[int]]) -> None:
    """Add rows for new tokens to the embedding and to the output head, tied or not.

    Args:
        model: it is changed in place.
        new: ids of new tokens, all above the old ones; each begins as the mean of the rows that it names, and of all
            old ones where it names none.
    """
    import torch

    old, size = min(new), max(new) + 1
    embedding: Any = model.get_input_embeddings()
    if size > embedding.weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {layer.weight.data_ptr(): layer.weight for layer in layers}
    weights |= {layer.bias.data_ptr(): layer.bias for layer in layers[1:] if getattr(layer, "bias", None) is not None}
    with torch.no_grad():
        for weight in weights.values():
            for number, pieces in new.items():
                rows = weight[list(pieces)] if pieces else weight[:old]
                weight[number] = rows.float().mean(0).to(weight.dtype)
