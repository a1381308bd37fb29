"""Objectives on a model: from the rows of a step to the scalars that are differentiated, and what is logged of them.

A step is computed in parts of `micro_batch_size`, whose losses and gradients add up to those of the whole step: a mean
over tokens is weighed by a part's share of the step's tokens, a mean over rows or pairs by its share of those. KTO's
baseline is one number for the whole step, worked out before its first part. Where several processes train, each has
some of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.params import AdaloraAdapter, FullAdapter, ReftAdapter
from tasks.core.ranks import shards_weights, world
from tasks.engine.collectives import share_of_rank, sum_over_ranks
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.logprobs import find_out, score_rows
from tasks.inference.rendered_rows import Row
from tasks.inference.rows import Scored, TokenRow
from tasks.models.device import autocast_to, compute_dtype, device, host_read, upload
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
from tasks.train.params import (
    AnyObjective,
    DpoObjective,
    KtoObjective,
    Method,
    OrpoObjective,
    SftObjective,
    SimpoObjective,
)
from tasks.train.reference_logprobs import Reference, adapter_off, sums_by_all, sums_of

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.inference.frozen_layer_cache import FrozenLayerCache

KEPT_BYTES = 1 << 30
"""So much is kept at most of what no adapter changes, but for ReFT, whose params say how much."""

LossTerm = tuple["Tensor", dict[str, "Tensor"]]
"""A scalar to differentiate, and its share of what is logged: scalars in float64, which nobody waits for yet."""


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


@dataclass(frozen=True)
class StepLosses:
    """An objective on a model, and how its losses are computed: settled once, before the first step.

    Attributes:
        model: in training or in evaluation.
        objective: what is minimised.
        rows: how many of them a forward pass takes; they may become fewer.
        reference: of DPO and KTO.
        below: keeps hidden states that do not change from epoch to epoch.
        orthogonality: the weight of AdaLoRA's penalty; None for other adapters, which have none.
        fast_products: whether float32 weights are multiplied in the machine's fast format: where all are trained.
    """

    model: Model
    objective: AnyObjective
    rows: AdaptiveMicroBatch
    reference: Reference
    below: FrozenLayerCache | None = None
    orthogonality: float | None = None
    fast_products: bool = False

    def of_step(self, examples: Sequence[Example]) -> Iterator[LossTerm]:
        """Compute the losses of a step, in parts that add up to it over all processes, each with what is logged."""
        for loss, logged, share in self._parts(examples):
            if self.orthogonality is None:
                yield loss, logged
            else:
                from tasks.adapters.adalora import orthogonality_penalty

                penalty = orthogonality_penalty(self.model) * share
                yield loss + self.orthogonality * penalty, {**logged, "penalty": penalty.detach().double()}

    def held_out(self, examples: Sequence[Example], batch_size: int) -> float:
        """Compute the objective's mean over held-out examples, without dropout: a step weighs as many rows as it has.

        The same in all processes, of which each computes some parts.
        """
        return self.rows.fitted(lambda: replace(self, below=None)._mean(examples, batch_size))

    def _mean(self, examples: Sequence[Example], batch_size: int) -> float:
        import torch

        self.model.eval()
        with torch.no_grad():
            steps = [
                len(step) * sum(loss.double() for loss, _, _ in self._parts(step))
                for step in parts_of(examples, batch_size)
            ]
        self.model.train()
        with host_read("the held-out loss"):
            total = float(sum(steps))
        return sum_over_ranks({"loss": total})["loss"] / len(examples)

    def _parts(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, dict[str, Tensor], float]]:
        """Yield the parts of a step that this process has, each with its share of the rows: 0 where it does not count.

        The penalty of AdaLoRA is not in them.
        """
        whole = None
        for some, counts in share_of_rank(examples, self.rows.rows, world()):
            with fast_products(enabled=self.fast_products):
                whole = whole or self._totals(examples)
                loss, logged = _LOSSES[self.objective.name](MicroBatch(self, some, whole), self.objective)
            if counts:
                yield loss, logged, len(some) / len(examples)
            else:
                yield loss * 0, {name: value.new_zeros(()) for name, value in logged.items()}, 0.0

    def _totals(self, examples: Sequence[Example]) -> StepTotals:
        kto = isinstance(self.objective, KtoObjective)
        baseline = self._baseline(mismatched_pairs(replies_of(examples))) if kto else None
        good = sum(isinstance(example[0], PairRow) or example[0].desirable for example in examples)
        return StepTotals(len(examples), target_tokens(examples, self.objective), good, baseline)

    def _baseline(self, others: Sequence[TokenRow]) -> Tensor:
        """Compute KTO's baseline for a step with these mismatched rows; 0 where there is none."""
        import torch

        from tasks.train.objectives import kl_baseline

        if not others:
            return torch.zeros((), device=self.model.device)

        def gaps(some: Sequence[TokenRow]) -> Tensor:
            policy = sums_of(self.model, some, self.rows.rows)
            return policy - upload(self.reference(some), policy.device)

        return kl_baseline(sums_by_all(gaps, others, self.rows.rows))


class MicroBatch(NamedTuple):
    """Some examples of a step, with all that an objective needs to tell their loss."""

    how: StepLosses
    examples: Sequence[Example]
    whole: StepTotals

    @property
    def row_share(self) -> float:
        """Return these rows' share of the step's rows."""
        return len(self.examples) / self.whole.rows

    @property
    def token_share(self) -> float:
        """Return the share of these rows in the tokens of the step's likelihood."""
        return target_tokens(self.examples, self.how.objective) / self.whole.tokens

    def scored(self, rows: Sequence[Row], *, with_mean: bool = False) -> Scored:
        """Score the log-probabilities of these examples' rows."""
        return score_rows(self.how.model, rows, self.how.below, with_mean=with_mean)


def losses_for(
    model: Model,
    examples: Sequence[Example],
    method: Method,
    rows: AdaptiveMicroBatch,
    reference: Reference | None = None,
) -> StepLosses:
    """Settle how a method's losses on a model are computed in a training on these examples.

    Args:
        model: with the method's adapter.
        examples: all that it is trained on.
        method: as it is in params.
        rows: how many of them a forward pass takes.
        reference: of DPO and KTO; without one, the adapter is switched off.

    Raises:
        BadModel: the model cannot be run on text alone, or is no decoder.
    """
    find_out(model)
    adapter = method.adapter
    return StepLosses(
        model,
        method.objective,
        rows,
        reference or adapter_off(model, rows),
        frozen_layer_cache_for(model, examples, method),
        adapter.orthogonality if isinstance(adapter, AdaloraAdapter) else None,
        isinstance(adapter, FullAdapter),
    )


def fast_products(*, enabled: bool) -> AbstractContextManager[object]:
    """Multiply float32 weights in the machine's fast format within this block."""
    return autocast_to(compute_dtype(), device()) if enabled else nullcontext()


def frozen_layer_cache_for(model: Model, examples: Sequence[Example], method: Method) -> FrozenLayerCache | None:
    """Build the cache of hidden states that no adapter changes, where there are such and they are needed again."""
    if shards_weights() or model.is_activation_checkpointing:
        return None  # what is needed again differs from process to process; or keys and values would get lost
    objective = method.objective
    noisy = isinstance(objective, SftObjective) and objective.neftune_alpha > 0
    # noise makes them others every time, and where prompts are targets, too, all of their tokens must be there
    if method.epochs == 1 or noisy or learns_prompts(objective):
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
    with noisy_embeddings(given.how.model, lengths, objective.neftune_alpha):
        scored = given.scored(rows, with_mean=objective.label_smoothing > 0)
    if scored.mean_logp is None:
        return sft_loss(scored.logp) * given.token_share, {}
    loss = smoothed_loss(scored.logp, scored.mean_logp, smoothing=objective.label_smoothing)
    return loss * given.token_share, _weighted({"nll": sft_loss(scored.logp)}, given.token_share)


def _orpo(given: MicroBatch, objective: OrpoObjective) -> LossTerm:
    from tasks.train.objectives import orpo_loss

    scored, likelihood = _pairs(given)
    means = scored.row_means()
    chosen, rejected = means.chunk(2)
    # of a reply alone it is a mean over pairs, with its prompt one over all tokens of the step: so each has its source
    with_prompt = -likelihood.mean() * (given.token_share / given.row_share)
    nll = with_prompt if learns_prompts(given.how.objective) else -chosen.mean()
    terms = orpo_loss(chosen, rejected, nll, weight=objective.weight)
    logged = _weighted({"nll": nll, "odds_penalty": terms.odds_penalty}, given.row_share)
    return terms.loss * given.row_share, _logged(given, scored, likelihood, means, objective.weight) | logged


def _dpo(given: MicroBatch, objective: DpoObjective) -> LossTerm:
    from tasks.train.objectives import hinge_loss, ipo_loss, sigmoid_loss

    expected = given.how.reference(replies_of(given.examples))
    scored, likelihood = _pairs(given)
    ratio = scored.row_sums() - upload(expected, scored.logp.device)
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
    rows, pairs = replies_of(given.examples), len(given.examples)
    if not learns_prompts(given.how.objective):
        scored = given.scored(rows)
        return scored, scored.logp[: sum(scored.tokens[:pairs])]
    scored = given.scored([*positive_sequences(given.examples, given.how.objective), *rows[pairs:]])
    replies = [counts for row in rows[:pairs] for counts in row.mask[1:]]
    replies += [True] * sum(row.scored_tokens for row in rows[pairs:])
    places = [place for place, is_reply in enumerate(replies) if is_reply]
    of_replies = scored.logp.index_select(0, upload(places, scored.logp.device))
    tokens = [row.scored_tokens for row in rows]
    return Scored.of(of_replies, tokens), scored.logp[: sum(scored.tokens[:pairs])]


def _logged(given: MicroBatch, scored: Scored, likelihood: Tensor, scores: Tensor, scale: float) -> dict[str, Tensor]:
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
    return _weighted({"nll": -likelihood.mean()}, given.token_share) | _weighted(of_pairs, given.row_share)


def _weighted(scalars: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weigh what is logged of some rows by their share, in float64, as it is added up."""
    return {name: value.detach().double() * share for name, value in scalars.items()}


def _kto(given: MicroBatch, objective: KtoObjective) -> LossTerm:
    from tasks.train.objectives import kto_loss

    baseline, rows = given.whole.baseline, replies_of(given.examples)
    if baseline is None:
        raise AssertionError("a step of KTO has a baseline")
    expected = given.how.reference(rows)
    scored = given.scored(rows)
    ratio = scored.row_sums() - upload(expected, scored.logp.device)
    labels = [row.desirable for row in rows]
    good = upload(labels, ratio.device)
    loss = kto_loss(
        ratio,
        good,
        baseline,
        beta=objective.beta,
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
    )
    right = ((ratio > baseline) == good).float().mean()
    logged = _weighted({"baseline": baseline, "accuracy": right}, given.row_share)
    return loss * given.row_share, logged | _rewards(given.whole, scored, objective.beta * ratio.detach(), labels)


def _rewards(whole: StepTotals, scored: Scored, rewards: Tensor, labels: Sequence[bool]) -> dict[str, Tensor]:
    """Compute what is logged of labelled replies by label, if the step has any; `rewards` (rows,)."""
    logged, bad = dict[str, Any](), whole.rows - whole.desirable
    of_label = {label: [row for row, good in enumerate(labels) if good == label] for label in (True, False)}
    if whole.desirable:
        logged["nll"] = -scored.of_rows(of_label[True]).detach().sum().double() / whole.tokens
        logged["reward_chosen"] = _of_rows(rewards, of_label[True]).sum().double() / whole.desirable
    if bad:
        logged["reward_rejected"] = _of_rows(rewards, of_label[False]).sum().double() / bad
    if bad and whole.desirable:
        logged["margin"] = logged["reward_chosen"] - logged["reward_rejected"]
    return logged


def _of_rows(numbers: Tensor, rows: Sequence[int]) -> Tensor:
    """Select numbers of some rows, (rows,)."""
    import torch

    return numbers.index_select(0, upload(torch.tensor(rows, dtype=torch.long), numbers.device))


_LOSSES: Mapping[str, Callable[[MicroBatch, Any], LossTerm]] = {
    "sft": _sft,
    "orpo": _orpo,
    "dpo": _dpo,
    "simpo": _simpo,
    "kto": _kto,
}
