"""Sampling of the next token, as transformers' `generate` takes it: the one place that maps options to processors.

Tokens are drawn by the Gumbel-max trick: the arg-max of logits with independent Gumbel noise on them is a sample from
their softmax (Gumbel 1954; arXiv:1411.0030, section 2). So `generate` only ever takes the arg-max, and the noise comes
from one generator per row. transformers' own sampling takes all rows' draws from one global generator, and what
a row gets then depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tasks.inference.params import Generation
from tasks.models.device import host_read, upload
from tasks.models.loader import Model

if TYPE_CHECKING:
    import torch
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
    """Generate the tokens that a decoder writes after each of a batch of prompts, up to the end token if any.

    `stop` is what else ends them.
    """
    found: dict[int, list[int]] = {}
    for group in _together(model, [len(prompt) for prompt in prompts], max_new_tokens):
        stopping = stop.criteria(group) if stop else None
        written = _generated(model, tokenizer, [prompts[n] for n in group], max_new_tokens, generation, stopping)
        found |= zip(group, written, strict=True)
    return [found[number] for number in range(len(prompts))]


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

    _forget_defaults(model)
    return holds(unwrapped(model), "it can be padded on the left", padded_and_alone)


def until(ids: list[int], end: int | None) -> list[int]:
    """Cut a sequence after its first end token, which is kept; after it there is only padding."""
    return ids[: ids.index(end) + 1] if end in ids else ids


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

    def see(self, rows: Sequence[int], written: Tensor) -> None:
        """Note which answers are at their end, after one token more of each: `written` (rows, tokens)."""
        texts = self._tokenizer.batch_decode(written[:, -self._last :])
        for row, text in zip(rows, texts, strict=True):
            if self.lengths[row] is None and any(stop in text for stop in self._texts):
                self.lengths[row] = written.shape[1]


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
        self._stop.see(self._rows, ids[:, self._start :])
        return torch.tensor([self._stop.lengths[row] is not None for row in self._rows], device=ids.device)


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What is kept of a model's own generation_config.json."""


def decoding(model: Model, generation: Generation, prompts: Sequence[Sequence[int]], *, start: int) -> dict[str, Any]:
    """Build what `model.generate` is given besides the prompts, their mask and the length.

    What a row's draws are is a function of the seed and the row's prompt alone: not of the batch, its padding or its
    size. Rows with the same prompt get the same text; another seed gives another. What remains is the rounding of the
    model's own logits, which may differ between batches; noise that stays the same seldom lets it change a token.

    From then on the model keeps only the ids of special tokens of its generation_config.json: whatever `generate` is
    not given, it takes from there.

    Args:
        model: a decoder, or an encoder-decoder.
        generation: the options.
        prompts: token ids, without padding.
        start: where generated tokens begin: after the padded prompts, or after an encoder-decoder's start token.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    _forget_defaults(model)
    processors = LogitsProcessorList()
    if generation.repetition_penalty != 1:
        processors.append(RepetitionPenalty(generation.repetition_penalty, start, generation.repetition_range))
    if generation.temperature > 0:
        processors.append(TemperatureLogitsWarper(generation.temperature))
        if generation.top_k:
            processors.append(TopKLogitsWarper(generation.top_k))
        if generation.top_p < 1:
            processors.append(TopPLogitsWarper(generation.top_p))
        processors.append(GumbelNoise([row_generator(generation.seed, prompt, model.device) for prompt in prompts]))
    return {"logits_processor": processors}


def _forget_defaults(model: Model) -> None:
    from peft import PeftModel
    from transformers import GenerationConfig

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig(**{name: getattr(own, name) for name in TOKEN_IDS})


def row_generator(seed: int, prompt: Sequence[int], device: torch.device) -> torch.Generator:
    """Create the random generator of one row's draws."""
    import hashlib

    import torch

    digest = hashlib.sha256(f"{seed}:{list(prompt)}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))  # 32 bits are all that a CPU's takes


class RepetitionPenalty:
    """Makes tokens less likely that were generated before (CTRL, arXiv:1909.05858, section 4.1).

    A positive logit is divided by the penalty. A negative one is multiplied by it, as transformers does: divided, as in
    the paper, it would become likelier. A token is penalised once, however often it came.

    Args:
        penalty: the paper's theta, > 0; below 1 it favours repetition.
        start: where generated tokens begin.
        last: how many of the last generated tokens count; 0: all.
    """

    def __init__(self, penalty: float, start: int, last: int) -> None:
        self.penalty, self.start, self.last = penalty, start, last

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Logits, (batch, vocab), after tokens (batch, seq), of which the first `start` are no generated ones."""
        generated = ids[:, max(self.start, ids.shape[1] - self.last if self.last else 0) :]
        found = scores.gather(1, generated)
        return scores.scatter(1, generated, (found / self.penalty).where(found > 0, found * self.penalty))


class GumbelNoise:
    """Adds Gumbel noise to logits, so that their arg-max is a sample of their softmax; tokens at -inf are never drawn.

    Args:
        generators: one for each row of the batch. A row's token t gets the t-th draw of its generator.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits, (batch, vocab), float64: the uniform numbers of float32 would cut the tail off at 6e-8."""
        import torch

        logits = scores.double()
        uniform = torch.empty_like(logits)  # in [0, 1): the noise -log(-log u) is finite or -inf, never +inf
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        return logits - uniform.log_().neg_().log_()
