"""What a decoder writes after prompts: in a batch that rows join and leave or, where it cannot, by `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tasks.inference.params import Generation
from tasks.inference.sampling import decoding, forget_defaults, until
from tasks.models.device import host_read, upload
from tasks.models.loader import Model
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def continuations(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation: Generation,
    stop: StopTexts | None = None,
) -> list[list[int]]:
    """Generate the tokens that a model writes after each of some prompts at once, up to the end token if any.

    `stop` is what else ends them. An encoder-decoder reads prompts as inputs.
    """
    rows = len(prompts)
    found = dict(each_continuation(model, tokenizer, prompts, max_new_tokens, generation, stop, rows=rows))
    return [found[number] for number in range(rows)]


def each_continuation(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation: Generation,
    stop: StopTexts | None = None,
    *,
    rows: int,
) -> Iterator[tuple[int, list[int]]]:
    """Generate the same of any number of prompts, and yield each with its number as it is done.

    So many `rows` are written at once; where one ends the next prompt takes its place, if the model can do that.
    """
    if not prompts:
        return
    from tasks.inference.decoding import can_decode
    from tasks.inference.encoder_decoder import generate_targets

    writes = architecture_of(model) is ENCODER_DECODER
    if not writes and can_decode(model, max(map(len, prompts)) + max_new_tokens):
        yield from _joining(model, tokenizer, prompts, max_new_tokens, generation, stop, rows)
        return
    write = generate_targets if writes else _generated
    for start in range(0, len(prompts), rows):
        numbers = range(len(prompts))[start : start + rows]
        lengths = [len(prompts[number]) for number in numbers]
        for group in [range(len(numbers))] if writes else _together(model, lengths, max_new_tokens):
            some = [numbers[each] for each in group]
            stopping = stop.criteria(some) if stop else None
            texts = write(model, tokenizer, [prompts[n] for n in some], max_new_tokens, generation, stopping)
            yield from zip(some, texts, strict=True)


def _joining(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation: Generation,
    stop: StopTexts | None,
    rows: int,
) -> Iterator[tuple[int, list[int]]]:
    from tasks.inference.decoding import Asked, DecodingBatch, Ended, Written

    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    longest = max(map(len, prompts)) + max_new_tokens
    batch = DecodingBatch(model, ends, rows=rows, slab_rows=rows, shortest=longest)
    for number, prompt in enumerate(prompts):
        batch.ask(number, Asked(tuple(prompt), max_new_tokens, generation))
    written: dict[int, list[int]] = {number: [] for number in range(len(prompts))}
    while batch.going or batch.waiting:
        told = batch.step()
        new = {number: each.token for number, each in told if isinstance(each, Written)}
        ended = [number for number, each in told if isinstance(each, Ended)]
        for number, token in new.items():
            written[number].append(token)
        stopped = stop.see(list(new), [written[number] for number in new]) if stop else []
        for number in stopped:
            batch.leave(number)
        for number in dict.fromkeys([*ended, *stopped]):
            yield number, written.pop(number)


# --- by transformers --------------------------------------------------------------------------------------------------


def _generated(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation: Generation,
    stopping: Any,
) -> list[list[int]]:
    import torch

    from tasks.adapters.prompt_tuning import for_generation
    from tasks.inference.rope import own_frequencies
    from tasks.inference.turns import in_turn
    from tasks.models.decoder import unwrapped

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id or 0)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        attended[row, longest - len(prompt) :] = 1
    ids, attended = upload(ids, model.device), upload(attended, model.device)
    reading = host_read("each new token, which may be the last")
    with torch.no_grad(), in_turn(model), own_frequencies(unwrapped(model)), reading:
        written: Tensor = for_generation(model).generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=attended,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stopping,
            **decoding(model, generation, prompts, start=longest),
        )
        answers = written[:, longest:].tolist()
    return [until(row, tokenizer.eos_token_id) for row in answers]


# --- which prompts may stand beside each other ------------------------------------------------------------------------


def _together(model: Model, lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Group prompts of these lengths so that none is changed by the others: by padding, or by longer rows."""
    from tasks.inference.rope import alike, grouped
    from tasks.models.decoder import unwrapped

    base = unwrapped(model)
    last = [length + max_new_tokens for length in lengths]
    found = []
    for group in alike(base.config, last):
        long = len(alike(base.config, [1, *(last[n] for n in group)])) > 1
        if long:  # positions change while these are written, when the longest of a batch gets there
            found += [[number] for number in group]
        elif len({lengths[n] for n in group}) == 1 or pads_on_left(model):
            found.append(group)
        else:
            found += [[group[n] for n in some] for some in grouped(lengths[n] for n in group)]
    return found


def pads_on_left(model: Model) -> bool:
    """Return whether a model writes the same after a prompt with padding on its left: some count it for a position."""
    import torch

    from tasks.adapters.prompt_tuning import for_generation
    from tasks.inference.agreement import holds
    from tasks.models.decoder import made_up_tokens, unwrapped

    def logits(ids: Tensor, attended: Tensor) -> Tensor:
        how = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        written = for_generation(model).generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=attended, max_new_tokens=2, min_new_tokens=2, **how
        )
        return torch.stack([each[-1] for each in written.logits])

    def padded_and_alone() -> Iterator[tuple[Tensor, Tensor]]:
        rows = made_up_tokens(model, [1, 2, 3, 4, 5, 6], [0, 0, 7, 8, 9, 10])
        mask = torch.ones_like(rows)
        mask[1, :2] = 0
        yield logits(rows, mask), logits(rows[1:, 2:], mask[1:, 2:])

    forget_defaults(model)
    return holds(unwrapped(model), "it can be padded on the left", padded_and_alone)


class StopTexts:
    """Ends each answer of a batch where the first of some texts is complete in it, whatever the others do.

    Args:
        tokenizer: what makes text of tokens.
        texts: what ends an answer.
        rows: how many answers there are.

    Attributes:
        lengths: how many tokens each answer has up to there; None for one that none of the texts has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rows: int) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._tokenizer, self._texts = tokenizer, [text for text in texts if text]
        self._last = 2 + max((len(text.encode()) for text in self._texts), default=0)  # no token is less than a byte

    def criteria(self, rows: Sequence[int] | None = None) -> Any:
        """Return this as `generate` takes it, for a batch of the answers of these numbers; for all without them."""
        from transformers import StoppingCriteriaList

        return StoppingCriteriaList([_Ends(self, range(len(self.lengths)) if rows is None else rows)])

    def see(self, rows: Sequence[int], written: Sequence[Sequence[int]]) -> list[int]:
        """Note which answers are at their end, after one token more of each; gives those that have come to it now."""
        if not self._texts:
            return []
        texts = self._tokenizer.batch_decode([list(tokens[-self._last :]) for tokens in written])
        ended = [
            (row, len(tokens))
            for row, tokens, text in zip(rows, written, texts, strict=True)
            if self.lengths[row] is None and any(stop in text for stop in self._texts)
        ]
        for row, length in ended:
            self.lengths[row] = length
        return [row for row, _ in ended]


class _Ends:
    """Ends answers of one batch."""

    def __init__(self, stop: StopTexts, rows: Sequence[int]) -> None:
        self._stop, self._rows = stop, rows
        self._start: int | None = None

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which answers are at their end, (rows,) bool, after one token more of each: `ids` (rows, tokens)."""
        import torch

        if self._start is None:
            self._start = ids.shape[1] - 1
        self._stop.see(self._rows, ids[:, self._start :].tolist())
        return torch.tensor([self._stop.lengths[row] is not None for row in self._rows], device=ids.device)
