"""PEFT configurations of the adapters of params."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.adapters.params import (
    OTHERS,
    AdaloraAdapter,
    AnyAdapter,
    BottleneckAdapter,
    FullAdapter,
    Ia3Adapter,
    LowRank,
    PeftAdapter,
    PrefixAdapter,
    PromptTuningAdapter,
    PTuningAdapter,
    PTuningV2Adapter,
    ReftAdapter,
)
from tasks.core.errors import BadModel

if TYPE_CHECKING:
    from peft import PeftConfig

_NEED_MORE = {
    "ADALORA": "steps that move its ranks: `name: adalora`",
    "CARTRIDGE": "a text to be taken from",
    "CPT": "examples of its own",
    "MULTITASK_PROMPT_TUNING": "a task for each row",
    "POLY": "a task for each row",
    "XLORA": "adapters to mix",
}
"""Methods of PEFT that a training on rows is not enough for."""


def peft_config(adapter: AnyAdapter, steps: int = 1, task: str = "CAUSAL_LM") -> PeftConfig:
    """Build the configuration of an adapter.

    Args:
        adapter: any but `full`, which is no adapter.
        steps: optimizer steps of the training; AdaLoRA plans with them.
        task: what PEFT calls the kind of model.

    Raises:
        BadModel: a method that PEFT does not have, a field that the method does not have, or steps that AdaLoRA cannot
            plan with.
    """
    import peft

    common: dict[str, Any] = {"task_type": task}
    match adapter:
        case FullAdapter():
            raise TypeError("training all weights takes no configuration of PEFT's")
        case LowRank():
            return peft.LoraConfig(**_low_rank(adapter), **common)
        case AdaloraAdapter():
            return _adalora(adapter, steps, task)
        case Ia3Adapter():
            return peft.IA3Config(target_modules=adapter.targets, feedforward_modules=adapter.inputs_of, **common)
        case PromptTuningAdapter():
            # the embeddings of a text are put in by `adapted.fresh`: PEFT would note where the tokenizer lay
            start = "SAMPLE_VOCAB" if adapter.start == "vocabulary" else "RANDOM"
            return peft.PromptTuningConfig(num_virtual_tokens=adapter.tokens, prompt_tuning_init=start, **common)
        case PTuningAdapter():
            return peft.PromptEncoderConfig(
                num_virtual_tokens=adapter.tokens,
                encoder_reparameterization_type=adapter.encoder.upper(),
                encoder_hidden_size=adapter.hidden_size,
                encoder_dropout=adapter.dropout,
                **common,
            )
        case PrefixAdapter():
            return peft.PrefixTuningConfig(
                num_virtual_tokens=adapter.tokens,
                prefix_projection=True,
                encoder_hidden_size=adapter.hidden_size,
                **common,
            )
        case PTuningV2Adapter():
            return peft.PrefixTuningConfig(num_virtual_tokens=adapter.tokens, **common)
        case ReftAdapter():
            from tasks.adapters.reft.tuner import ReftConfig

            own = adapter.model_dump(exclude={"name", "rank", "bias", "cache_mib"})
            named = {"intervention": adapter.name, "r": adapter.rank, "source_bias": adapter.bias}
            return _made(ReftConfig, {**own, **named, **common})
        case BottleneckAdapter():
            from tasks.adapters.bottleneck import BottleneckConfig

            return BottleneckConfig(**adapter.model_dump(exclude={"name"}), **common)
        case PeftAdapter():
            return _any(adapter, task)


def _made(kind: type[PeftConfig], fields: Mapping[str, Any]) -> PeftConfig:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise BadModel("is no configuration of this method", where="adapter", got=str(error)) from error


def _low_rank(adapter: LowRank) -> dict[str, Any]:
    """Return the fields of LoRA; of a fused projection all chosen parts are one update of so many times the rank.

    `fused_projections` keeps the parts apart; alpha grows with the rank so that each part's scale stays what it was.
    """
    name = adapter.name  # type: ignore[attr-defined]  # every section of the family has one
    ranks, alphas = _by_pattern(adapter.rank), _by_pattern(adapter.alpha)
    rank, alpha = ranks.pop(OTHERS), alphas.pop(OTHERS)
    targets = adapter.targets
    if isinstance(targets, dict):
        for module, parts in targets.items():
            if parts != "all":
                own_rank, own_alpha = ranks.get(module, rank), alphas.get(module, alpha)
                ranks[module] = own_rank * len(parts)
                alphas[module] = own_alpha * (math.sqrt(len(parts)) if name == "rslora" else len(parts))
        targets = list(targets)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        "use_rslora": name == "rslora",
        "use_dora": name == "dora",
    }


def _by_pattern(value: float | Mapping[str, Any]) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {OTHERS: value}


def _adalora(adapter: AdaloraAdapter, steps: int, task: str) -> PeftConfig:
    import peft

    first, last = adapter.warmup_steps, adapter.final_steps
    if first + last >= steps:
        raise BadModel(
            "leaves AdaLoRA no step in which to move ranks",
            where="adapter.warmup_steps, adapter.final_steps",
            got=f"{first} + {last} of {steps} steps",
            fix="lower them, or train longer",
        )
    return peft.AdaLoraConfig(
        init_r=adapter.rank,
        target_r=adapter.target_rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        tinit=first,
        tfinal=last,
        deltaT=adapter.every_steps,
        beta1=adapter.smoothing,
        beta2=adapter.smoothing,
        orth_reg_weight=adapter.orthogonality,
        total_step=steps,
        task_type=task,
    )


def _any(adapter: PeftAdapter, task: str) -> PeftConfig:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    chosen = known.get(adapter.method.upper())
    if chosen is None:
        names = ", ".join(sorted(known))
        raise BadModel("PEFT has no such method", where="adapter.method", got=adapter.method, expected=names)
    if needs := _NEED_MORE.get(adapter.method.upper()):
        raise BadModel("is trained otherwise", where="adapter.method", got=adapter.method, expected=needs)
    return _made(chosen, {**adapter.config, "task_type": task})
