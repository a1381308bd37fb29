"""Sampling of the next token, as transformers' `generate` takes it: the one place that maps options to processors.

Tokens are drawn by the Gumbel-max trick: the arg-max of logits with independent Gumbel noise on them is a sample from
their softmax (Gumbel 1954; arXiv:1411.0030, section 2). So `generate` only ever takes the arg-max, and the noise comes
from one generator per row. transformers' own sampling takes all rows' draws from one global generator, and what
a row gets then depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.inference.params import Generation
from tasks.models.loader import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def until(ids: list[int], end: int | None) -> list[int]:
    """Cut a sequence after its first end token, which is kept; after it there is only padding."""
    return ids[: ids.index(end) + 1] if end in ids else ids


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
    forget_defaults(model)
    drawn = prompts if generation.temperature > 0 else ()
    draws = [row_generator(generation.seed, prompt, model.device) for prompt in drawn]
    return {"logits_processor": processors(generation, draws, start)}


def processors(generation: Generation, draws: Sequence[torch.Generator], start: int) -> Any:
    """Build what makes of logits numbers whose arg-max is the next token.

    Args:
        generation: the options.
        draws: each row's generator, if tokens are drawn.
        start: where generated tokens begin.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made = LogitsProcessorList()
    if generation.repetition_penalty != 1:
        made.append(RepetitionPenalty(generation.repetition_penalty, start, generation.repetition_range))
    if generation.temperature > 0:
        made.append(TemperatureLogitsWarper(generation.temperature))
        if generation.top_k:
            made.append(TopKLogitsWarper(generation.top_k))
        if generation.top_p < 1:
            made.append(TopPLogitsWarper(generation.top_p))
        made.append(GumbelNoise(draws))
    return made


def forget_defaults(model: Model) -> None:
    """Forget what a model's own generation_config.json says, but for the ids of special tokens."""
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
