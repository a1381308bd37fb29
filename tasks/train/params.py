"""Params of a method: its adapter, its objective, and how it is optimised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from tasks.adapters.params import DEFAULT_ADAPTER, AdaloraAdapter, AnyAdapter, FullAdapter
from tasks.core.params import Count, NotNegative, Positive, Section, Seed
from tasks.engine.params import Schedule


class ReferringObjective(Section):
    """Objective that compares a policy with its reference, the untuned base."""

    reference: Literal["adapter_off", "precomputed"] = "adapter_off"
    """Computed by switching the adapter off at every step, or once for all rows before the first."""


class SftObjective(Section):
    """Cross-entropy on the assistant's tokens."""

    name: Literal["sft"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of a target that is spread evenly over the vocabulary (arXiv:1512.00567, section 7); 0: none."""
    neftune_alpha: NotNegative = 0.0
    """Noise on the input embeddings while training, the alpha of arXiv:2310.05914 (5 to 15 there); 0: none."""


class PairObjective(Section):
    """Objective on a chosen and a rejected reply to the same prompt."""


class OrpoObjective(PairObjective):
    """Cross-entropy on the chosen reply plus an odds-ratio penalty (arXiv:2403.07691)."""

    name: Literal["orpo"]
    weight: NotNegative = 0.1
    """The paper's lambda (0.1 in its experiments); TRL calls it beta."""
    likelihood: Literal["reply", "prompt_and_reply"] = "reply"
    """What the cross-entropy is of: the chosen reply alone, per token and then over pairs, as in the paper and in
    LLaMA-Factory; or also its prompt, over all tokens of a step, as in TRL."""


class DpoObjective(PairObjective, ReferringObjective):
    """Direct preference optimisation against a reference, the untuned base (arXiv:2305.18290)."""

    name: Literal["dpo"]
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """The paper's own; IPO (arXiv:2310.12036), per token as TRL has it; or hinge (SLiC, arXiv:2305.10425)."""
    beta: Positive = 0.1
    """How strongly the reference holds; IPO's paper calls it tau."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """How probable it is that a pair is the wrong way round (conservative DPO); with `sigmoid` only."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> DpoObjective:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for the loss sigmoid; with {self.loss} it must be 0.0")
        return self


class SimpoObjective(PairObjective):
    """Length-normalised preference optimisation with a margin, without a reference (arXiv:2405.14734)."""

    name: Literal["simpo"]
    beta: Positive = 2.0
    """What log-probabilities per token are multiplied by to be rewards (2.0 to 10 in the paper)."""
    gamma: NotNegative = 1.0
    """By how much the chosen reply's reward must exceed the rejected one's (0.3 to 1.6 in the paper)."""


class KtoObjective(ReferringObjective):
    """Learns from replies that are labelled good or bad, without pairs (arXiv:2402.01306)."""

    name: Literal["kto"]
    beta: Positive = 0.1
    """How soon a gain over the reference saturates."""
    desirable_weight: NotNegative = 1.0
    """Weight of good replies; equation 8 says how it should balance their number."""
    undesirable_weight: NotNegative = 1.0
    """Weight of bad replies."""


AnyObjective: TypeAlias = Annotated[
    SftObjective | OrpoObjective | DpoObjective | SimpoObjective | KtoObjective, Field(discriminator="name")
]

OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "adamw_schedule_free"
]


class Evaluation(Section):
    """The loss on held-out rows in the course of a training, and what follows from it."""

    every_steps: Count = 50
    """How often it is computed; and after the last step."""
    early_stopping_patience: Literal["never"] | Count = "never"
    """The training stops after so many evaluations in a row that are no better than the best; or never early."""
    keep: Literal["last", "best"] = "best"
    """Which weights become the adapter: those of the last step, or those with the lowest held-out loss."""


class Samples(Section):
    """Samples of the model's replies to held-out prompts in the course of a training, decoded greedily."""

    every_steps: Count = 50
    """How often it is asked; and after the last step."""
    prompts: Count = 4
    """How many prompts, the first of the held-out rows."""
    max_new_tokens: Count = 48
    """Tokens in a reply, at most."""


MICRO_BATCH_SIZE = 8
"""Rows in a forward pass at most, where params name no number."""

LORA_LIKE = ("lora", "rslora", "dora", "qlora", "lora8bit")
REFT = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
LEARNING_RATES: Mapping[str, float] = {
    "full": 2e-5,  # Stanford Alpaca's, of 7B models
    **dict.fromkeys(LORA_LIKE, 2e-4),  # arXiv:2305.14314, table 9, of 7B and 13B
    "adalora": 1e-3,  # arXiv:2303.10512, appendix
    "ia3": 3e-3,  # arXiv:2205.05638
    "prompt_tuning": 3e-2,  # PEFT's examples; the 0.3 of arXiv:2104.08691 is for Adafactor
    "p_tuning": 1e-3,
    "prefix": 1e-3,
    "p_tuning_v2": 5e-3,  # its authors' scripts
    **dict.fromkeys(REFT, 9e-4),  # arXiv:2404.03592, of LLaMA-7B
    "bottleneck": 1e-4,  # arXiv:2005.00052
    "peft": 2e-4,
}
"""The peak by adapter, where params name none."""


class Method(Section):
    """A named pair of adapter and objective, and how it is optimised."""

    adapter: AnyAdapter = DEFAULT_ADAPTER
    objective: AnyObjective = SftObjective(name="sft")
    epochs: Count = 1
    """Passes over the rows."""
    batch_size: Count = 32
    """Rows in a step."""
    micro_batch_size: Count = Field(default_factory=lambda known: min(known["batch_size"], MICRO_BATCH_SIZE))
    """Rows in a forward pass, of each process; 8 at most, unless it is said. A step adds up the gradients of as many
    passes as it takes."""
    optimizer: OptimizerName = "adamw"
    """AdamW or Lion; with states in 8 bits (`_8bit`), or that a GPU may move to the host (`paged_`); or AdamW that
    averages its steps instead of a schedule's decay (`_schedule_free`, arXiv:2405.15682)."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        default_factory=lambda known: LEARNING_RATES[known["adapter"].name]
    )
    """The peak, after warm-up; AdamW moves every weight by about so much a step. By default what is usual for the
    adapter, such as 2e-4 for LoRA and QLoRA (tasks/train/params.py, LEARNING_RATES)."""
    schedule: Schedule = Field(
        default_factory=lambda known: "constant" if known["optimizer"] == "adamw_schedule_free" else "cosine"
    )
    """From the peak on; linear and cosine end at zero; so does {wsd: 0.2}, which goes down in the last fifth only."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.0
    """Decoupled (AdamW); never on rotations."""
    max_grad_norm: Positive = 1.0
    """The gradient is scaled down to this norm."""
    checkpoint_every_steps: Count = 50
    """What a kill loses at most."""
    evaluation: Literal["none"] | Evaluation = "none"
    """The loss on held-out rows on the way: to stop early, or to keep the best weights."""
    samples: Literal["none"] | Samples = "none"
    """Replies to held-out prompts on the way."""
    fit_memory: bool = False
    """Whether a training may make do with less memory: if by its estimate it would not fit, activations are computed
    again in the backward pass; a step that still runs out of memory is taken again with half of `micro_batch_size`. The
    gradients are the same. One process can do that, several cannot."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Where the log goes besides MLflow; each needs its package. TensorBoard's files are in .temper/tensorboard."""
    seed: Seed = 1
    """Of the adapter's initial weights, the order of rows, and dropout."""

    @model_validator(mode="after")
    def _passes_fit(self) -> Method:
        if self.micro_batch_size > self.batch_size:
            raise ValueError("micro_batch_size must be at most batch_size")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Method:
        if isinstance(self.objective, KtoObjective) and self.batch_size < 2:
            raise ValueError("kto compares each reply with those of other rows: batch_size must be at least 2")
        switches = isinstance(self.objective, ReferringObjective) and self.objective.reference == "adapter_off"
        if switches and isinstance(self.adapter, FullAdapter):
            raise ValueError("full has no adapter to switch off: objective.reference must be precomputed")
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Method:
        if self.optimizer == "adamw_schedule_free" and self.schedule != "constant":
            raise ValueError("adamw_schedule_free stands for a schedule: it needs `schedule: constant`")
        ends_early = isinstance(self.evaluation, Evaluation) and self.evaluation.early_stopping_patience != "never"
        keeps_best = isinstance(self.evaluation, Evaluation) and self.evaluation.keep == "best"
        if isinstance(self.adapter, AdaloraAdapter) and (ends_early or keeps_best):
            fix = "it needs `early_stopping_patience: never` and `keep: last`"
            raise ValueError(f"adalora takes ranks away until its last step: {fix}")
        return self
