from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.adapters.attach import init_adapter
from tasks.adapters.hooks import body_of
from tasks.inference.encoder_decoder import PairRow
from tasks.inference.rows import TokenRow
from tasks.models.loader import load_model
from tasks.train.neftune import noise, noisy_embeddings
from tests.helpers.encoder_decoders import LORA as T5_LORA
from tests.helpers.encoder_decoders import make_base
from tests.helpers.samples import LORA, SFT, method
from tests.helpers.training import loss_of

NOISY = {**SFT, "neftune_alpha": 5.0}


def test_noise_of_a_row_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hook, which implements the authors' code, on a row without padding, from the same random numbers."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding: Any = nn.Embedding(50, 8)
    embedding.neftune_noise_alpha = 5.0
    embedded = embedding(torch.arange(6)[None])
    torch.manual_seed(1)
    theirs = neftune_post_forward_hook(embedding, (), embedded)
    torch.manual_seed(1)
    torch.testing.assert_close(embedded + noise(embedded, [6], 5.0), theirs)


def test_noise_depends_on_a_rows_length_and_not_on_its_padding() -> None:
    """Algorithm 1: even within +-alpha / sqrt(length x width); nothing on padding."""
    torch.manual_seed(1)
    wide = noise(torch.zeros(2, 400, 64), [100, 300], 5.0)
    torch.manual_seed(1)
    alone = [noise(torch.zeros(1, length, 64), [length], 5.0)[0] for length in (100, 300)]
    for made, row, length in zip(wide, alone, (100, 300), strict=True):
        bound = 5.0 / (length * 64) ** 0.5
        assert torch.equal(made[:length], row)
        assert not made[length:].any()
        assert 0.99 * bound < row.abs().max() <= bound
        assert row.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def rows() -> list[tuple[TokenRow]]:
    return [
        (TokenRow(list(range(5, 15)), [False] * 4 + [True] * 6, 4),),
        (TokenRow([9, 8, 7], [False, True, True], 1),),
    ]


def test_noise_is_in_training_alone_and_the_same_by_seed(pico_base: Path) -> None:
    model = init_adapter(pico_base, method(LORA, SFT).adapter).float()
    plain = loss_of(model, rows(), method(LORA, SFT))[0].item()
    assert loss_of(model.eval(), rows(), method(LORA, NOISY))[0].item() == plain
    model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(loss_of(model, rows(), method(LORA, NOISY))[0].item())
    assert found[0] == found[1] != found[2]
    assert abs(found[0] - plain) > 1e-5
    assert loss_of(model, rows(), method(LORA, SFT))[0].item() == plain  # no hook is left behind


def test_what_an_encoder_reads_gets_noise_and_what_its_decoder_reads_does_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "t5", "t5", ["a bird sings", "a dog barks"])
    model: Any = load_model(base).train()
    seen: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for name, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        first = part.block[0]
        first.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().clone()))
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for alpha in (0.0, 5.0):
        with noisy_embeddings(model, [3], alpha):
            model(**given)
    assert torch.equal(*seen["decoder"])
    assert not torch.equal(*seen["encoder"])
    assert body_of(model) is model.get_encoder()
    trained = init_adapter(base, method(T5_LORA, SFT).adapter).train()
    loss, _ = loss_of(trained, [(PairRow([5, 6, 7], [8, 1]),)], method(LORA, NOISY))
    assert torch.isfinite(loss)
