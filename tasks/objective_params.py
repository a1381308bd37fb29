"""What a method of params.yaml learns by: one section for each objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.fields import NotNegative, Positive, Section


class ReferringObjective(Section):
    """What compares a policy with its reference, the untuned base."""

    reference: Literal["adapter_off", "precomputed"]
    """Computed by switching the adapter off at every step, or once for all rows before the first."""


class SftObjective(Section):
    """Cross-entropy on the assistant's tokens."""

    name: Literal["sft"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """The share of a target that is spread evenly over the vocabulary (arXiv:1512.00567, section 7); 0: none."""
    neftune_alpha: NotNegative
    """Noise on the input embeddings while training, the alpha of arXiv:2310.05914 (5 to 15 there); 0: none."""


class PairObjective(Section):
    """What learns from a chosen and a rejected reply to the same prompt."""


class OrpoObjective(PairObjective):
    """Cross-entropy on the chosen reply plus an odds-ratio penalty (arXiv:2403.07691)."""

    name: Literal["orpo"]
    weight: NotNegative
    """The paper's lambda; TRL calls it beta."""
    likelihood: Literal["reply", "prompt_and_reply"]
    """What the cross-entropy is of: the chosen reply alone, per token and then over pairs, as in the paper and in
    LLaMA-Factory; or also its prompt, over all tokens of a step, as in TRL."""


class DpoObjective(PairObjective, ReferringObjective):
    """Direct preference optimisation against a reference, the untuned base (arXiv:2305.18290)."""

    name: Literal["dpo"]
    loss: Literal["sigmoid", "ipo", "hinge"]
    """The paper's own; IPO (arXiv:2310.12036), per token as TRL has it; or hinge (SLiC, arXiv:2305.10425)."""
    beta: Positive
    """How strongly the reference holds; IPO's paper calls it tau."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """How probable it is that a pair is the wrong way round (conservative DPO); with `sigmoid` only."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> DpoObjective:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for the loss sigmoid; with {self.loss} it must be 0.0")
        return self


class SimpoObjective(PairObjective):
    """Length-normalised preference optimisation with a margin, without a reference (arXiv:2405.14734)."""

    name: Literal["simpo"]
    beta: Positive
    """What log-probabilities per token are multiplied by to be rewards (2.0 to 10 in the paper)."""
    gamma: NotNegative
    """By how much the chosen reply's reward must exceed the rejected one's (0.3 to 1.6 in the paper)."""


class KtoObjective(ReferringObjective):
    """Learns from replies that are labelled good or bad, without pairs (arXiv:2402.01306)."""

    name: Literal["kto"]
    beta: Positive
    """How soon a gain over the reference saturates."""
    desirable_weight: NotNegative
    """Weight of good replies; equation 8 says how it should balance their number."""
    undesirable_weight: NotNegative
    """Weight of bad replies."""


AnyObjective = SftObjective | OrpoObjective | DpoObjective | SimpoObjective | KtoObjective
