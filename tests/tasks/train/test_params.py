from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from tests.helpers.samples import DPO, KTO, LORA, ORPO, SFT, method

FULL = {"name": "full", "modules": "all"}


def test_objectives_that_say_nothing_are_as_in_trl() -> None:
    import trl

    theirs = {
        name: {field.name: field.default for field in fields(config)}
        for name, config in (("dpo", trl.DPOConfig), ("kto", trl.KTOConfig))
    }
    dpo, kto = (method(LORA, {"name": name}).objective.model_dump() for name in theirs)
    assert dpo["beta"] == theirs["dpo"]["beta"]
    assert dpo["label_smoothing"] == theirs["dpo"]["label_smoothing"]
    for key in ("beta", "desirable_weight", "undesirable_weight"):
        assert kto[key] == theirs["kto"][key]


@pytest.mark.parametrize(
    ("adapter", "objective", "changes", "said"),
    [
        (FULL, DPO, {}, "full has no adapter to switch off: objective.reference must be precomputed"),
        (FULL, KTO, {}, "full has no adapter to switch off"),
        (LORA, KTO, {"batch_size": 1}, "kto compares each reply with those of other rows"),
        (LORA, {**DPO, "loss": "ipo", "label_smoothing": 0.1}, {}, "with ipo it must be 0.0"),
        (LORA, {**DPO, "label_smoothing": 0.5}, {}, "less than 0.5"),
        (LORA, {**DPO, "beta": 0.0}, {}, "greater than 0"),
        (LORA, {**DPO, "loss": "robust"}, {}, "'sigmoid', 'ipo' or 'hinge'"),
        (LORA, {**SFT, "label_smoothing": 1.0}, {}, "less than 1"),
        (LORA, {**SFT, "neftune_alpha": -1.0}, {}, "greater than or equal to 0"),
        (LORA, {**ORPO, "likelihood": "prompt"}, {}, "'reply' or 'prompt_and_reply'"),
        (LORA, {**KTO, "undesirable_weight": -1.0}, {}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    adapter: dict[str, Any], objective: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        method(adapter, objective, **changes)


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_all_weights_may_be_trained_against_a_precomputed_reference(objective: dict[str, Any]) -> None:
    assert method(FULL, {**objective, "reference": "precomputed"}).adapter.name == "full"
