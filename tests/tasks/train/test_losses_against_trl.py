"""Every objective against TRL's own trainers on the same token ids: losses, gradients, and the course of 20 steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tasks.adapters.attach import init_adapter
from tasks.inference.rows import TokenRow
from tasks.models.loader import Model
from tasks.train.examples import Example, mismatched_pairs, replies_of
from tests.helpers.samples import DPO, KTO, LORA, ORPO, SFT, SIMPO, method
from tests.helpers.training import losses_of

STEPS, ROWS = 20, 4
PAD = 0
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
"""Trainers want text when they are made; what they are driven with is token ids."""


class Reply(NamedTuple):
    """A row of TRL's, in token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    good: bool


def replies() -> list[list[Reply]]:
    """The rows of each step: prompts and replies of many lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(5, 300, (length,), generator=generator).tolist()

    return [[Reply(ids(3, 9), ids(2, 7), ids(2, 7), n != 1) for n in range(ROWS)] for _ in range(STEPS)]


def joined(prompt: list[int], reply: list[int], good: bool = True) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt), good)


def one(step: Sequence[Reply]) -> list[Example]:
    return [(joined(row.prompt, row.chosen, row.good),) for row in step]


def pairs(step: Sequence[Reply]) -> list[Example]:
    return [(joined(row.prompt, row.chosen), joined(row.prompt, row.rejected)) for row in step]


# --- TRL's side -------------------------------------------------------------------------------------------------------


def arguments(kind: Any, folder: Path, **own: Any) -> Any:
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        max_length=64,
        per_device_train_batch_size=ROWS,
        **own,
    )


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_of(trainer: Any, config: Any, base: Path, folder: Path, rows: list[dict[str, Any]], **own: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments(config, folder, **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(),
    )


Loss = Callable[[Sequence[Reply]], Tensor]
Theirs = tuple[Model, Loss, Callable[[], dict[str, float]]]
"""Their model, the loss that they give it on a step's rows, and what they logged last, under our names."""

NAMES = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "nll_loss": "nll",
    "log_odds_chosen": "log_odds_ratio",
    "kl": "baseline",
}


def logged_by(trainer: Any) -> Callable[[], dict[str, float]]:
    return lambda: {NAMES[k]: values[-1] for k, values in trainer._metrics["train"].items() if k in NAMES}


def sft(base: Path, folder: Path) -> Theirs:
    from trl import SFTConfig, SFTTrainer

    def row(reply: Reply) -> dict[str, Any]:
        ids = reply.prompt + reply.chosen
        return {"input_ids": ids, "labels": [-100] * len(reply.prompt) + reply.chosen}

    rows = [row(reply) for reply in replies()[0]]
    trainer = trainer_of(SFTTrainer, SFTConfig, base, folder, rows, dataset_kwargs={"skip_prepare_dataset": True})

    def loss(step: Sequence[Reply]) -> Tensor:
        batch = trainer.data_collator([row(reply) for reply in step])
        tokens = torch.tensor(sum(len(reply.chosen) for reply in step))
        found: Tensor = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
        return found

    return trainer.model, loss, dict


def dpo(form: str, beta: float) -> Callable[[Path, Path], Theirs]:
    def make(base: Path, folder: Path) -> Theirs:
        from trl import DPOConfig, DPOTrainer

        def row(reply: Reply) -> dict[str, Any]:
            return {"prompt_ids": reply.prompt, "chosen_ids": reply.chosen, "rejected_ids": reply.rejected}

        trainer = trainer_of(DPOTrainer, DPOConfig, base, folder, [PAIR], loss_type=[form], beta=beta)

        def loss(step: Sequence[Reply]) -> Tensor:
            found: Tensor = trainer.compute_loss(trainer.model, trainer.data_collator([row(r) for r in step]))
            return found

        return trainer.model, loss, logged_by(trainer)

    return make


def kto(base: Path, folder: Path) -> Theirs:
    from trl import KTOConfig, KTOTrainer

    def row(reply: Reply) -> dict[str, Any]:
        return {"prompt_ids": reply.prompt, "completion_ids": reply.chosen, "label": reply.good}

    rows = [{"prompt": "a", "completion": text, "label": text == "b"} for text in "bc"]
    own = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    trainer = trainer_of(KTOTrainer, KTOConfig, base, folder, rows, **own)

    def loss(step: Sequence[Reply]) -> Tensor:
        """Their mismatched replies are those of the row before, in the order of the data: they are given ours."""
        others = {
            tuple(m.ids[: m.prompt_tokens]): m.ids[m.prompt_tokens :] for m in mismatched_pairs(replies_of(one(step)))
        }
        given = [row(reply) | {"KL_completion_ids": others[tuple(reply.prompt)]} for reply in step]
        found: Tensor = trainer.compute_loss(trainer.model, trainer.data_collator(given))
        return found

    return trainer.model, loss, logged_by(trainer)


def concatenated(step: Sequence[Reply]) -> dict[str, Tensor]:
    """What the collator of the older trainers makes."""

    def padded(rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    batch = {}
    for name in ("chosen", "rejected"):
        rows = [(reply.prompt, getattr(reply, name)) for reply in step]
        batch[f"{name}_input_ids"] = padded([p + r for p, r in rows], PAD)
        batch[f"{name}_attention_mask"] = padded([[1] * len(p + r) for p, r in rows], 0)
        batch[f"{name}_labels"] = padded([[-100] * len(p) + r for p, r in rows], -100)
    return batch


def older(name: str, **own: Any) -> Callable[[Path, Path], Theirs]:
    """The experimental trainers, which tokenize themselves; they are driven by their loss on a batch."""

    def make(base: Path, folder: Path) -> Theirs:
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        kinds = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}[name]
        trainer = trainer_of(*kinds, base, folder, [PAIR], **own)
        last: dict[str, float] = {}

        def loss(step: Sequence[Reply]) -> Tensor:
            found, metrics = trainer.get_batch_loss_metrics(trainer.model, concatenated(step), train_eval="train")
            last.update({NAMES[key]: float(value) for key, value in metrics.items() if key in NAMES})
            result: Tensor = found
            return result

        return trainer.model, loss, lambda: last

    return make


CASES: dict[str, tuple[Callable[[Path, Path], Theirs], dict[str, Any], Callable[[Sequence[Reply]], list[Example]]]] = {
    "sft": (sft, SFT, one),
    "orpo": (older("orpo", beta=0.3), {**ORPO, "weight": 0.3, "likelihood": "prompt_and_reply"}, pairs),
    "dpo": (dpo("sigmoid", 0.3), {**DPO, "beta": 0.3}, pairs),
    "ipo": (dpo("ipo", 0.3), {**DPO, "loss": "ipo", "beta": 0.3}, pairs),
    "hinge": (dpo("hinge", 0.3), {**DPO, "loss": "hinge", "beta": 0.3}, pairs),
    "kto": (kto, {**KTO, "beta": 0.3, "undesirable_weight": 1.5}, one),
    "simpo": (older("cpo", loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5), SIMPO, pairs),
}


def unlogged(name: str) -> set[str]:
    """CPO's likelihood is 0 where it is not part of the loss."""
    return {"nll"} if name == "simpo" else set()


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_twenty_steps_are_trls(pico_base: Path, tmp_path: Path, name: str) -> None:
    make, objective, examples_of = CASES[name]
    their_model, their_loss, their_log = make(pico_base, tmp_path)
    params = method(LORA, objective, batch_size=ROWS, micro_batch_size=ROWS)
    model = init_adapter(pico_base, params.adapter).float().train()
    their_model.train()
    torch.manual_seed(3)
    ours, theirs = trained(model), trained(their_model)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for key, parameter in ours.items():
            parameter += 0.1 * torch.randn_like(parameter)
            theirs[key].copy_(parameter)
    steps, before = replies(), {key: parameter.detach().clone() for key, parameter in ours.items()}
    ((loss, logged),) = losses_of(model, examples_of(steps[0]), params)
    loss.backward()
    expected = their_loss(steps[0])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in ours.items():
        gradient, their_gradient = parameter.grad, theirs[key].grad
        assert gradient is not None
        assert their_gradient is not None
        assert (gradient - their_gradient).norm() < 1e-5 * gradient.norm()
    for key, value in their_log().items():
        if key not in unlogged(name):
            assert logged[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    optimizers = [torch.optim.AdamW(each.values(), lr=3e-3) for each in (ours, theirs)]
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0.0
        for part, _ in losses_of(model, examples_of(step), params.model_copy(update={"micro_batch_size": 2})):
            part.backward()
            total += part.item()
        expected = their_loss(step)
        expected.backward()
        assert total == pytest.approx(expected.item(), rel=1e-4)
        for optimizer, each in zip(optimizers, (ours, theirs), strict=True):
            torch.nn.utils.clip_grad_norm_(each.values(), 1.0)
            optimizer.step()
    assert all((parameter - before[key]).norm() > 0.01 for key, parameter in ours.items())  # it was no standing still
