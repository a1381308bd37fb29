from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.adapters.attach import init_adapter
from tasks.core.progress import Progress
from tasks.engine.memory import AdaptiveMicroBatch
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.loader import load_model
from tasks.train.reference_logprobs import adapter_off, precomputed, sums_of, switched_off
from tests.helpers.samples import ADALORA, DPO, IA3, KTO, LORA, LOREFT, QLORA, method
from tests.helpers.training import train

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "dropout": 0.5},
    "qlora": QLORA,
    "loreft": LOREFT,
    "adalora": ADALORA,
    "ia3": IA3,
    "prompt_tuning": {"name": "prompt_tuning", "tokens": 4, "start": "vocabulary", "text": ""},
    "prefix": {"name": "prefix", "tokens": 4, "hidden_size": 8},
    "oft": {"name": "peft", "method": "OFT", "config": {"target_modules": ["q_proj"], "oft_block_size": 8}},
    "bottleneck": {
        "name": "bottleneck",
        "form": "pfeiffer",
        "reduction_factor": 8.0,
        "non_linearity": "relu",
        "scaling": 1.0,
        "layers": "all",
        "dropout": 0.1,
    },
}


def rows(count: int = 5) -> list[TokenRow]:
    torch.manual_seed(1)
    made = []
    for n in range(count):
        ids = torch.randint(5, 300, (6 + n,)).tolist()
        made.append(TokenRow(ids, [False] * 3 + [True] * (3 + n), 3))
    return made


def moved(base: Path, adapter: dict[str, Any]) -> Any:
    model = init_adapter(base, method(adapter, DPO).adapter, 9)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


@pytest.mark.parametrize("name", ADAPTERS)
def test_with_the_adapter_off_a_model_is_its_base_to_the_bit(pico_base: Path, name: str) -> None:
    model = moved(pico_base, ADAPTERS[name])
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    found = adapter_off(model, AdaptiveMicroBatch(5, fit=False))(rows())
    quantized: Any = method(QLORA, DPO).adapter if name == "qlora" else None
    with torch.no_grad():
        expected = score_tokens(load_model(pico_base, quantized and quantized.base_quantization), rows()).row_sums()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert {key: p.requires_grad for key, p in model.named_parameters()} == trained
    assert model.training
    model.eval()
    with torch.no_grad():
        assert not torch.equal(score_tokens(model, rows()).row_sums(), expected)  # it is on again


def test_what_is_trained_is_told_again_after_an_error(pico_base: Path) -> None:
    model = moved(pico_base, ADALORA)
    trained = {key: p.requires_grad for key, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no memory"), switched_off(model):
        raise RuntimeError("no memory")
    assert {key: p.requires_grad for key, p in model.named_parameters()} == trained


def test_a_reference_computed_before_is_that_of_the_adapter_off(pico_base: Path, tmp_path: Path) -> None:
    model = moved(pico_base, ADAPTERS["prompt_tuning"])
    reference = precomputed(model, rows(), 2, tmp_path / "reference")
    torch.testing.assert_close(
        reference(rows()[::-1]),
        adapter_off(model, AdaptiveMicroBatch(5, fit=False))(rows()[::-1]),
        rtol=1e-4,
        atol=1e-3,
    )


def test_each_row_is_computed_once_over_epochs_and_retries(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.train.reference_logprobs

    computed: list[int] = []

    def counted(model: Any, some: list[TokenRow], rows_at_once: int) -> Any:
        computed.append(len(some))
        return sums_of(model, some, rows_at_once)

    monkeypatch.setattr(tasks.train.reference_logprobs, "sums_of", counted)
    params = method(LORA, {**DPO, "reference": "precomputed"}, epochs=3, checkpoint_every_steps=1)
    examples: list[Any] = [(row, row._replace(ids=[*row.ids[:3], 5, *row.ids[4:]])) for row in rows(6)]

    def attempt(die_after: int) -> None:
        def on_row(row: dict[str, Any]) -> None:
            if row["step"] == die_after:
                raise KeyboardInterrupt

        train(init_adapter(pico_base, params.adapter), examples, params, tmp_path, Progress("t", 6, "steps"), on_row)

    with pytest.raises(KeyboardInterrupt):
        attempt(3)
    attempt(0)
    assert sum(computed) == 12


def test_a_damaged_reference_is_computed_again_and_said_so(
    pico_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, kept = moved(pico_base, LORA), tmp_path / "reference"
    whole = precomputed(model, rows(), 5, kept)(rows())
    file = next(kept.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    again = precomputed(model, rows(), 5, kept)(rows())
    assert "the reference is computed again" in capsys.readouterr().out
    assert torch.equal(whole, again)
    assert torch.equal(whole, precomputed(model, rows(), 5, kept)(rows()))


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_both_references_train_the_same_adapter(pico_base: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    """In float32, 6 steps; KTO's mismatched replies of every epoch are among what is computed before."""
    logs = []
    for number, reference in enumerate(("adapter_off", "precomputed")):
        params = method({**LORA}, {**objective, "reference": reference}, epochs=2, batch_size=2, micro_batch_size=2)
        torch.manual_seed(1)
        made = rows(6)
        if objective is KTO:
            examples: list[Any] = [(row._replace(desirable=n % 2 == 0),) for n, row in enumerate(made)]
        else:
            examples = [(row, row._replace(ids=[*row.ids[:3], 5, *row.ids[4:]])) for row in made]
        model = init_adapter(pico_base, params.adapter).float()
        logs.append(train(model, examples, params, tmp_path / str(number), Progress("t", 6, "steps")))
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
