"""Scores of targets and answers to inputs of an encoder-decoder model (T5, arXiv:1910.10683).

Everything goes through the model's own forward pass and its own `generate`, so that families that scale, bias or shift
in their own way, and adapters that add tokens of theirs, stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import BadData
from tasks.inference.params import Generation
from tasks.inference.rows import Likelihood, Scored
from tasks.models.device import host_read, upload
from tasks.models.loader import Model
from tasks.tokenization.architecture import positions_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

IGNORED = -100
"""The label of what is no token of a target."""


class PairRow(NamedTuple):
    """Token ids of an input and of its target, each with the end token that it has."""

    input_ids: Sequence[int]
    target_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        """Return the length of the row in tokens."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def scored_tokens(self) -> int:
        """Count the tokens that the loss falls on."""
        return len(self.target_ids)


class Padded(NamedTuple):
    """Rows of token ids, filled up on the right: `ids` and `attended` (1 for tokens), both (rows, longest) int64."""

    ids: Tensor
    attended: Tensor


def padded(rows: Sequence[Sequence[int]], fill: int, device: Any) -> Padded:
    """Pad rows of token ids to one tensor; on the right, because some encoders count positions from the first."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(
        [torch.tensor(list(row), dtype=torch.long) for row in rows], batch_first=True, padding_value=fill
    )
    lengths = torch.tensor([len(row) for row in rows])
    attended = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return Padded(upload(ids, device), upload(attended, device))


def score_pairs(
    model: Model, rows: Sequence[PairRow], *, with_mean: bool = False, with_likeliest: bool = False
) -> Scored:
    """Score the log-probability of every target token, end token included, given the input and the tokens before it.

    The decoder reads the target shifted right by the model's own start token; its mean is the loss that transformers
    computes from `labels`. `with_mean` also gives the mean over the vocabulary, `with_likeliest` what is the arg-max.
    """
    import torch

    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.inference.linear_cross_entropy import score_logits
    from tasks.inference.turns import in_turn

    labels = padded([row.target_ids for row in rows], IGNORED, model.device).ids
    prompts, inputs = prompts_of(model), [tuple(row.input_ids) for row in rows]
    where = prompts.given(torch.tensor([len(each) for each in inputs])) if prompts else nullcontext()
    with in_turn(model), where, host_read("whether rows are padded"):
        logits = model(
            **_encoded(model, inputs),
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels),  # type: ignore[operator]
            use_cache=False,
        ).logits
    _, longest, vocabulary = logits.shape
    virtual = longest - labels.shape[1]  # the positions of a soft prompt, where the decoder has one
    places = [n * longest + virtual + at for n, row in enumerate(rows) for at in range(len(row.target_ids))]
    found = logits.reshape(-1, vocabulary).index_select(0, upload(places, model.device))
    targets = upload([token for row in rows for token in row.target_ids], model.device)
    scores = score_logits(found, targets, with_mean=with_mean, with_likeliest=with_likeliest)
    return Scored.of(scores.logp, [len(row.target_ids) for row in rows], scores.mean_logp, scores.likeliest)


def score_pair_rows(
    model: Model, rows: Sequence[PairRow], *, tokens: int, done: Callable[[int], None] = lambda count: None
) -> list[Likelihood]:
    """Score the likelihood of each row's target, in their order; rows with the same input are scored together.

    Args:
        model: an encoder-decoder.
        rows: what to score.
        tokens: how many a forward pass computes at most, padding included.
        done: called after each pass with the number of rows that it scored.
    """
    import torch

    order = sorted(range(len(rows)), key=lambda n: (-rows[n].tokens, rows[n]))
    found: dict[int, Likelihood] = {}
    while order:
        count = max(1, tokens // max(1, rows[order[0]].tokens))
        some, order = order[:count], order[count:]
        with torch.no_grad():
            scores = score_pairs(model, [rows[n] for n in some], with_likeliest=True)
        found |= zip(some, scores.likelihoods(), strict=True)
        done(len(some))
    return [found[n] for n in range(len(rows))]


def _encoded(model: Model, inputs: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Build a forward pass's arguments for its inputs: without gradients, the same inputs are encoded once.

    A soft prompt and edits of prompts reach the encoder through the whole model's forward pass alone.
    """
    import torch

    from tasks.adapters.prompt_tuning import virtual_tokens
    from tasks.adapters.reft.prompt_positions import prompts_of
    from tasks.models.decoder import unwrapped

    number = {each: n for n, each in enumerate(dict.fromkeys(inputs))}
    if torch.is_grad_enabled() or len(number) == len(inputs) or virtual_tokens(model) or prompts_of(model):
        whole = padded(inputs, 0, model.device)
        return {"input_ids": whole.ids, "attention_mask": whole.attended}
    once = padded(list(number), 0, model.device)
    outputs = unwrapped(model).get_encoder()(input_ids=once.ids, attention_mask=once.attended)
    whose = upload([number[each] for each in inputs], model.device)
    outputs.last_hidden_state = outputs.last_hidden_state[whose]
    return {"encoder_outputs": outputs, "attention_mask": once.attended[whose]}


def generate_targets(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation: Generation,
    stopping: StoppingCriteriaList | None = None,
) -> list[list[int]]:
    """Generate answers to a batch of inputs: the tokens after the start token, up to the end token if there is one.

    `stopping` is what else ends answers.
    """
    import torch

    from tasks.adapters.prompt_tuning import for_generation
    from tasks.inference.sampling import decoding, until
    from tasks.inference.turns import in_turn

    given = padded(inputs, 0, model.device)
    with torch.no_grad(), in_turn(model), host_read("each new token, which may be the last"):
        written: Tensor = for_generation(model).generate(  # type: ignore[operator]
            input_ids=given.ids,
            attention_mask=given.attended,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stopping,
            **decoding(model, generation, inputs, start=1),
        )
        answers = written[:, 1:].tolist()
    return [until(row, tokenizer.eos_token_id) for row in answers]


def check_room(model: Model, rows: Sequence[tuple[str, Sequence[int]]], max_new_tokens: int) -> None:
    """Refuse inputs or answers beyond the positions of a model that counts them (BART's; T5 does not).

    Args:
        model: the model that is to answer.
        rows: ids of rows, with their inputs.
        max_new_tokens: how long an answer may get.

    Raises:
        BadData: one of them is too long.
    """
    room = positions_of(model.config)
    if max_new_tokens > room:
        raise BadData("evaluate.max_new_tokens is more than the model can write", got=str(max_new_tokens))
    if cramped := [f"{row}: {len(ids)} tokens" for row, ids in rows if len(ids) > room]:
        raise BadData(
            f"{len(cramped)} inputs are longer than the model can read",
            examples=cramped,
            expected=f"inputs of at most {room} tokens",
            fix="lower render.max_tokens",
        )
