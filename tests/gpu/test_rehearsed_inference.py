"""Evaluation, generation and all that reads a model, on a pretended device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tasks.adapters.attach import init_adapter
from tasks.adapters.params import Adapted
from tasks.base.perplexity import perplexity
from tasks.base.pretraining import train_on_blocks
from tasks.core.progress import Progress
from tasks.evaluate.continuation_scores import Continuation, score_continuations
from tasks.evaluate.held_out import token_logps
from tasks.inference.continuations import StopTexts, continuations
from tasks.inference.encoder_decoder import PairRow, generate_targets, score_pair_rows
from tasks.inference.params import GREEDY, Generation
from tasks.inference.rows import TokenRow
from tasks.merge.stage import kl_divergence
from tasks.models.device import seed_everything
from tasks.models.loader import Model, load_model
from tasks.models.pretended_device import PretendedDevice
from tasks.tokenization.chat_template import load_tokenizer
from tests.helpers.encoder_decoders import make_base
from tests.helpers.rehearsal import ADAPTERS, SAMPLED, rows_for, trained_by
from tests.helpers.samples import pretrain_params
from tests.helpers.training import held_out_loss

TOKEN = "each new token, which may be the last"
EVALUATED = ("lora", "qlora", "loreft", "noreft", "prompt_tuning", "prefix", "bottleneck")


def adapted(base: Path, adapter: str) -> Model:
    seed_everything(1)
    model = init_adapter(base, trained_by(adapter, "sft").adapter)
    with torch.no_grad():  # a fresh adapter changes nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def here_and_there(make: Callable[[], Model], work: Callable[[Model], Any]) -> tuple[Any, Any, Counter[str]]:
    """What some work gives on the host and on the device, and what the host read there, by the reason."""
    expected, model = work(make()), make()
    with PretendedDevice() as pretended:
        pretended.take(model)
        found = work(model)
    return found, expected, Counter(read.reason for read in pretended.reads)


@pytest.mark.parametrize("adapter", EVALUATED)
def test_endings_are_scored_with_one_read_a_batch(pico_base: Path, adapter: str) -> None:
    contexts = [list(range(5, 5 + length)) for length in (6, 6, 9, 3)]
    endings = [Continuation(context, [7 + n, 9][: 1 + n % 2]) for n, context in enumerate(contexts)]
    found, expected, reads = here_and_there(
        lambda: adapted(pico_base, adapter), lambda model: score_continuations(model, endings, tokens=16)
    )
    assert [each.logp for each in found] == pytest.approx([each.logp for each in expected], rel=1e-4)
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    assert 1 <= reads["the likelihoods of a batch"] <= len(endings)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("adapter", EVALUATED)
def test_answers_are_those_of_the_host(
    pico_base: Path, tokenizer: PreTrainedTokenizerBase, adapter: str, generation: Generation
) -> None:
    prompts = [list(range(5, 5 + length)) for length in (6, 6, 9)]

    def answers(model: Model) -> list[list[int]]:
        return continuations(model, tokenizer, prompts, 6, generation, StopTexts(tokenizer, ["zq"], len(prompts)))

    found, expected, reads = here_and_there(lambda: adapted(pico_base, adapter), answers)
    assert found == expected
    if "prompt" in adapter or adapter == "prefix":
        assert reads[TOKEN] <= 5 * 6 * 2 + 4  # transformers asks five times a token whether all rows are at their end
    else:
        assert reads[TOKEN] == 6  # of each token once, for all rows


@pytest.mark.parametrize("adapter", ["lora", "loreft", "prefix"])
def test_the_loss_on_held_out_rows_is_read_once(pico_base: Path, adapter: str) -> None:
    params = trained_by(adapter, "sft")
    found, expected, reads = here_and_there(
        lambda: adapted(pico_base, adapter), lambda model: held_out_loss(model, rows_for("sft"), params)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert reads["the held-out loss"] == 1


def test_rows_are_scored_texts_are_read_and_models_compared(pico_base: Path) -> None:
    ids = [list(row.ids) for (row,) in rows_for("sft") if isinstance(row, TokenRow)]
    rows = [{"ids": each, "mask": [False] + [True] * (len(each) - 1), "prompt_tokens": 1} for each in ids]
    probes = [{"input_ids": each} for each in ids[:3]]

    def read(model: Model) -> tuple[Any, ...]:
        return (
            token_logps(model, rows, 4),
            perplexity(model, ids, context_tokens=16, text_bytes=100, batch_tokens=64),
            kl_divergence(model, model, probes),
        )

    found, expected, reads = here_and_there(lambda: load_model(pico_base), read)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert found[2] == expected[2]
    assert reads["the log-probabilities of a batch"] == 2
    assert reads["how far two models are apart on a probe"] == 3


@pytest.mark.parametrize("adapter", ["lora", "loreft"])
def test_an_encoder_decoder_is_scored_and_answers(tmp_path: Path, adapter: str) -> None:
    base = make_base(tmp_path, "t5", ["a few words of some text", "and a few other words"])
    params: dict[str, Any] = ADAPTERS[adapter] | ({"targets": ["q", "v"]} if adapter == "lora" else {})
    rows = [PairRow([5, 6, 7, 1], [8, 9, 1]), PairRow([5, 6, 7, 1], [8, 1]), PairRow([9, 1], [6, 6, 6, 1])]

    def make() -> Model:
        seed_everything(1)
        return init_adapter(base, Adapted.model_validate({"adapter": params}).adapter).eval()

    def work(model: Model) -> tuple[Any, Any]:
        return score_pair_rows(model, rows, tokens=64), generate_targets(
            model, load_tokenizer(base), [row.input_ids for row in rows], 4, SAMPLED
        )

    (scores, answers), (expected, wanted), _ = here_and_there(make, work)
    assert [each.logp for each in scores] == pytest.approx([each.logp for each in expected], rel=1e-5)
    assert answers == wanted


def test_weights_are_pretrained(pico_base: Path, tmp_path: Path) -> None:
    params, blocks = pretrain_params(), torch.randint(5, 300, (40, 32), dtype=torch.int32).numpy()
    logs: list[list[dict[str, Any]]] = []

    def work(model: Model) -> None:
        model.float().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters())
        folder = tmp_path / str(len(logs))
        logs.append(train_on_blocks(model, [optimizer], blocks, params, folder, Progress("t", 5, "steps")))

    *_, reads = here_and_there(lambda: load_model(pico_base), work)
    losses = [[row["loss"] for row in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert reads["a step's numbers, all at once, before the optimizer takes it"] == len(losses[0])
