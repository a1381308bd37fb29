"""Objectives on a model: from the rows of a step to the scalars that are differentiated, and what is logged of them.

A step is computed in parts of `micro_batch_size`, whose losses and gradients add up to those of the whole step: a mean
over tokens is weighed by a part's share of the step's tokens, a mean over rows or pairs by its share of those. KTO's
baseline is one number for the whole step, worked out before its first part. Where several processes train, each has
some of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.params import AdaloraAdapter, FullAdapter, ReftAdapter
from tasks.core.ranks import shards_weights, world
from tasks.engine.collectives import shard, sum_over_ranks
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rendered_rows import score_rows
from tasks.inference.rows import Scored, TokenRow
from tasks.models.device import compute_dtype, device
from tasks.models.loader import Model
from tasks.train.batching import shapes_of
from tasks.train.examples import (
    Example,
    learns_prompts,
    mismatched_pairs,
    parts_of,
    positive_sequences,
    replies_of,
    target_tokens,
)
from tasks.train.neftune import noisy_embeddings
from tasks.train.params import DpoObjective, KtoObjective, Method, OrpoObjective, SftObjective, SimpoObjective
from tasks.train.reference_logprobs import Reference, adapter_off, sums_by_all, sums_of

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.inference.frozen_layer_cache import FrozenLayerCache

KEPT_BYTES = 1 << 30
"""So much is kept at most of what no adapter changes, but for ReFT, whose params say how much."""

LossTerm = tuple["Tensor", dict[str, float]]
"""A scalar to differentiate, and its share of what is logged."""


# --- a step and its parts ---------------------------------------------------------------------------------------------


class StepTotals(NamedTuple):
    """Totals of a step that each of its parts needs.

    Attributes:
        rows: rows of data.
        tokens: tokens of its likelihood.
        desirable: rows that are not labelled bad.
        baseline: KTO's z_0, in nats, a scalar.
    """

    rows: int
    tokens: int
    desirable: int
    baseline: Tensor | None


class MicroBatch(NamedTuple):
    """Some examples of a step, with all that an objective needs to tell their loss."""

    model: Model
    examples: Sequence[Example]
    method: Method
    below: FrozenLayerCache | None
    reference: Reference
    whole: StepTotals

    @property
    def row_share(self) -> float:
        """Return these rows' share of the step's rows."""
        return len(self.examples) / self.whole.rows

    @property
    def token_share(self) -> float:
        """Return the share of these rows in the tokens of the step's likelihood."""
        return target_tokens(self.examples, self.method) / self.whole.tokens


def losses_of(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    below: FrozenLayerCache | None = None,
    reference: Reference | None = None,
) -> Iterator[LossTerm]:
    """Compute the objective on a step's examples, in parts of `micro_batch_size` that add up to it over all processes.

    Args:
        model: in training or in evaluation.
        examples: the rows of the step.
        method: says what the objective is.
        below: keeps what does not change from epoch to epoch.
        reference: of DPO and KTO; without one, the adapter is switched off.
    """
    for loss, logged, share in _objective(model, examples, method, below, reference):
        if isinstance(method.adapter, AdaloraAdapter):
            from tasks.adapters.adalora import orthogonality_penalty

            penalty = orthogonality_penalty(model) * share
            yield loss + method.adapter.orthogonality * penalty, {**logged, "penalty": penalty.item()}
        else:
            yield loss, logged


def loss_of(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    below: FrozenLayerCache | None = None,
    reference: Reference | None = None,
) -> LossTerm:
    """Compute the objective alone on all examples of a step at once."""
    together = method.model_copy(update={"micro_batch_size": len(examples)})
    loss, logged, _ = next(_objective(model, examples, together, below, reference))
    return loss, logged


def held_out_loss(
    model: Model, examples: Sequence[Example], method: Method, reference: Reference | None = None
) -> float:
    """Compute the objective's mean over held-out examples, without dropout: a step weighs as many rows as it has.

    The same in all processes, of which each computes some parts.
    """
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for step in parts_of(examples, method.batch_size):
            parts = _objective(model, step, method, None, reference)
            total += len(step) * sum(loss.item() for loss, _, _ in parts)
    model.train()
    return sum_over_ranks({"loss": total})["loss"] / len(examples)


def _objective(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    below: FrozenLayerCache | None,
    reference: Reference | None,
) -> Iterator[tuple[Tensor, dict[str, float], float]]:
    """Yield the parts of a step that this process has, each with its share of the rows: 0 where it does not count."""
    reference = reference or adapter_off(model, method.micro_batch_size)
    whole = None
    for some, counts in shard(examples, method.micro_batch_size, world()):
        with fast_products(method):
            whole = whole or _whole(model, examples, method, reference)
            loss, logged = _LOSSES[method.objective.name](
                MicroBatch(model, some, method, below, reference, whole), method.objective
            )
        if counts:
            yield loss, logged, len(some) / len(examples)
        else:
            yield loss * 0, dict.fromkeys(logged, 0.0), 0.0


def _whole(model: Model, examples: Sequence[Example], method: Method, reference: Reference) -> StepTotals:
    kto = isinstance(method.objective, KtoObjective)
    baseline = _baseline(model, mismatched_pairs(replies_of(examples)), method, reference) if kto else None
    good = sum(isinstance(example[0], PairRow) or example[0].desirable for example in examples)
    return StepTotals(len(examples), target_tokens(examples, method), good, baseline)


def _baseline(model: Model, others: Sequence[TokenRow], method: Method, reference: Reference) -> Tensor:
    """Compute KTO's baseline for a step with these mismatched rows; 0 where there is none."""
    import torch

    from tasks.train.objectives import kl_baseline

    if not others:
        return torch.zeros((), device=model.device)

    def gaps(some: Sequence[TokenRow]) -> Tensor:
        policy = sums_of(model, some, method.micro_batch_size)
        return policy - reference(some).to(policy.device)

    return kl_baseline(sums_by_all(gaps, others, method.micro_batch_size))


def fast_products(method: Method) -> AbstractContextManager[object]:
    """Multiply float32 weights in the machine's fast format where all of them are trained."""
    import torch

    if not isinstance(method.adapter, FullAdapter):
        return nullcontext()
    return torch.autocast(device().type, compute_dtype(), enabled=compute_dtype() != torch.float32)


def frozen_layer_cache_for(model: Model, examples: Sequence[Example], method: Method) -> FrozenLayerCache | None:
    """Build the cache of hidden states that no adapter changes, where there are such and they are needed again."""
    if shards_weights() or model.is_activation_checkpointing:
        return None  # what is needed again differs from process to process; or keys and values would get lost
    objective = method.objective
    noisy = isinstance(objective, SftObjective) and objective.neftune_alpha > 0
    # noise makes them others every time, and where prompts are learnt all of their tokens must be there
    if method.epochs == 1 or noisy or learns_prompts(method):
        return None
    from tasks.inference.frozen_layer_cache import FrozenLayerCache

    if isinstance(method.adapter, ReftAdapter):
        return FrozenLayerCache.of(model, shapes_of(examples), method.adapter.cache_mib << 20)
    if method.fit_memory or not isinstance(objective, SftObjective):
        return None  # memory may be short; and pairs gain more by a prompt that is computed once
    return FrozenLayerCache.of(model, shapes_of(examples), KEPT_BYTES)


# --- objectives -------------------------------------------------------------------------------------------------------


def _sft(given: MicroBatch, objective: SftObjective) -> LossTerm:
    from tasks.train.objectives import sft_loss, smoothed_loss

    rows = [example[0] for example in given.examples]
    lengths = [len(row.input_ids) if isinstance(row, PairRow) else row.tokens for row in rows]
    with noisy_embeddings(given.model, lengths, objective.neftune_alpha):
        scored = score_rows(given.model, rows, given.below, with_mean=objective.label_smoothing > 0)
    if scored.mean_logp is None:
        return sft_loss(scored.logp) * given.token_share, {}
    loss = smoothed_loss(scored.logp, scored.mean_logp, smoothing=objective.label_smoothing)
    return loss * given.token_share, {"nll": sft_loss(scored.logp).item() * given.token_share}


def _orpo(given: MicroBatch, objective: OrpoObjective) -> LossTerm:
    from tasks.train.objectives import orpo_loss

    scored, likelihood = _pairs(given)
    means = scored.row_means()
    chosen, rejected = means.chunk(2)
    # of a reply alone it is a mean over pairs, with its prompt one over all tokens of the step: so each has its source
    with_prompt = -likelihood.mean() * (given.token_share / given.row_share)
    nll = with_prompt if learns_prompts(given.method) else -chosen.mean()
    terms = orpo_loss(chosen, rejected, nll, weight=objective.weight)
    logged = {"nll": nll.item() * given.row_share, "odds_penalty": terms.odds_penalty.item() * given.row_share}
    return terms.loss * given.row_share, _logged(given, scored, likelihood, means, objective.weight) | logged


def _dpo(given: MicroBatch, objective: DpoObjective) -> LossTerm:
    from tasks.train.objectives import hinge_loss, ipo_loss, sigmoid_loss

    expected = given.reference(replies_of(given.examples))
    scored, likelihood = _pairs(given)
    ratio = scored.row_sums() - expected.to(scored.logp.device)
    chosen, rejected = ratio.chunk(2)
    chosen_each, rejected_each = (ratio / scored.row_tokens()).chunk(2)
    if objective.loss == "sigmoid":
        loss = sigmoid_loss(chosen - rejected, beta=objective.beta, label_smoothing=objective.label_smoothing)
    elif objective.loss == "ipo":
        loss = ipo_loss(chosen_each - rejected_each, beta=objective.beta)
    else:
        loss = hinge_loss(chosen - rejected, beta=objective.beta)
    return loss * given.row_share, _logged(given, scored, likelihood, ratio, objective.beta)


def _simpo(given: MicroBatch, objective: SimpoObjective) -> LossTerm:
    from tasks.train.objectives import simpo_loss

    scored, likelihood = _pairs(given)
    means = scored.row_means()
    loss = simpo_loss(*means.chunk(2), beta=objective.beta, gamma=objective.gamma)
    return loss * given.row_share, _logged(given, scored, likelihood, means, objective.beta)


def _pairs(given: MicroBatch) -> tuple[Scored, Tensor]:
    """Score replies of pairs, all chosen ones and then all rejected ones; return the likelihood's terms, (tokens,)."""
    import torch

    rows, pairs = replies_of(given.examples), len(given.examples)
    if not learns_prompts(given.method):
        scored = score_rows(given.model, rows, given.below)
        return scored, scored.logp[scored.row < pairs]
    scored = score_rows(given.model, [*positive_sequences(given.examples, given.method), *rows[pairs:]], given.below)
    replies = [learnt for row in rows[:pairs] for learnt in row.mask[1:]]
    replies += [True] * sum(row.scored_tokens for row in rows[pairs:])
    of_reply = torch.tensor(replies, device=scored.row.device)
    return Scored(scored.logp[of_reply], scored.row[of_reply], scored.rows), scored.logp[scored.row < pairs]


def _logged(given: MicroBatch, scored: Scored, likelihood: Tensor, scores: Tensor, scale: float) -> dict[str, float]:
    """Compute the log of pairs: `scores` (2 x pairs,) times `scale` are the rewards that the objective assigns."""
    from tasks.train.objectives import log_odds_ratio

    means, (chosen, rejected) = scored.row_means().detach(), scores.detach().chunk(2)
    of_pairs = {
        "reward_chosen": scale * chosen.mean(),
        "reward_rejected": scale * rejected.mean(),
        "margin": scale * (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).float().mean(),
        "log_odds_ratio": log_odds_ratio(*means.chunk(2)).mean(),
    }
    logged = {name: value.item() * given.row_share for name, value in of_pairs.items()}
    return {"nll": -likelihood.mean().item() * given.token_share, **logged}


def _kto(given: MicroBatch, objective: KtoObjective) -> LossTerm:
    import torch

    from tasks.train.objectives import kto_loss

    baseline, rows = given.whole.baseline, replies_of(given.examples)
    if baseline is None:
        raise AssertionError("a step of KTO has a baseline")
    expected = given.reference(rows)
    scored = score_rows(given.model, rows, given.below)
    ratio = scored.row_sums() - expected.to(scored.logp.device)
    good = torch.tensor([row.desirable for row in rows], device=ratio.device)
    loss = kto_loss(
        ratio,
        good,
        baseline,
        beta=objective.beta,
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
    )
    right = ((ratio > baseline) == good).float().mean()
    logged = {"baseline": baseline.item() * given.row_share, "accuracy": right.item() * given.row_share}
    return loss * given.row_share, logged | _rewards(given.whole, scored, objective.beta * ratio.detach(), good)


def _rewards(whole: StepTotals, scored: Scored, rewards: Tensor, good: Tensor) -> dict[str, float]:
    """Compute what is logged of labelled replies by label, if the step has any; `rewards` and `good` (rows,)."""
    logged, bad = {}, whole.rows - whole.desirable
    if whole.desirable:
        logged["nll"] = -scored.logp[good[scored.row]].sum().item() / whole.tokens
        logged["reward_chosen"] = rewards[good].sum().item() / whole.desirable
    if bad:
        logged["reward_rejected"] = rewards[~good].sum().item() / bad
    if bad and whole.desirable:
        logged["margin"] = logged["reward_chosen"] - logged["reward_rejected"]
    return logged


_LOSSES: Mapping[str, Callable[[MicroBatch, Any], LossTerm]] = {
    "sft": _sft,
    "orpo": _orpo,
    "dpo": _dpo,
    "simpo": _simpo,
    "kto": _kto,
}
