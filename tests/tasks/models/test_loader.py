from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tasks.adapters.params import QloraAdapter
from tasks.core.errors import BadModel
from tasks.inference.logprobs import score_tokens
from tasks.inference.rows import TokenRow
from tasks.models.loader import load_model, model_files
from tests.helpers.samples import QLORA


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")


def index_without_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle only": (pickled, "pickle weights are refused"),
    "own code": (edited("config.json", auto_map={"AutoModel": "x.Y"}), "run its own code"),
    "own attention": (edited("config.json", _attn_implementation_internal="x/y"), "run its own code"),
    "a kernel of the hub": (edited("config.json", attn_implementation="owner/kernel"), "run its own code"),
    "a kernel for a part": (
        edited("config.json", text_config={"attn_implementation": {"": "sdpa", "vision": "owner/kernel"}}),
        "run its own code",
    ),
    "code of a part": (edited("config.json", text_config={"auto_map": {"AutoModel": "x.Y"}}), "run its own code"),
    "layers without end": (edited("config.json", num_hidden_layers=10**9), "has sizes that no model has"),
    "a size in words": (edited("config.json", hidden_size="large"), "has sizes that no model has"),
    "no heads": (edited("config.json", num_attention_heads=0), "has sizes that no model has"),
    "a size of a part": (edited("config.json", text_config={"vocab_size": 2**41}), "has sizes that no model has"),
    "experts without end": (edited("config.json", text_config={"num_local_experts": 10**6}), "has sizes that no model"),
    "shared experts without end": (edited("config.json", n_routed_experts=-(10**9)), "has sizes that no model has"),
    "a vocabulary without weights": (edited("config.json", vocab_size=10**8), "its weights are a small part"),
    "layers without weights": (edited("config.json", num_hidden_layers=9999, hidden_size=512), "are a small part"),
    "experts without weights": (
        edited("config.json", text_config={"num_experts": 999, "hidden_size": 2048, "intermediate_size": 4096}),
        "num_experts: 999",
    ),
    "positions without weights": (edited("config.json", n_positions=10**9), "n_positions: 1000000000"),
    "nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000 + "]" * 200_000),
        "not valid JSON",
    ),
    "own tokenizer": (edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "run its own code"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a model folder"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "missing shard": (index_without_shard, "shard named in the index is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unsafe_or_broken_folder_is_refused(pico_base: Path, tmp_path: Path, name: str) -> None:
    change, said = BAD[name]
    shutil.copytree(pico_base, tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(BadModel) as caught:
        model_files(tmp_path / "base")
    assert said in str(caught.value)
    assert caught.value.exit_code == 65
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "change",
    [
        edited("config.json", model_type="foo"),
        edited("config.json", model_type=["llama"]),
        edited("config.json", num_key_value_heads=0),
        edited("config.json", rope_parameters=[3]),
        edited("config.json", architectures=7, tie_word_embeddings={"a": 1}, hidden_act=[1]),
        edited("config.json", dtype="nothing"),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
    ],
)
def test_a_model_that_does_not_load_says_so(pico_base: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(BadModel, match="does not load"):
        load_model(tmp_path / "base")


def without_a_weight(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.layers.0.mlp.up_proj.weight"}


def under_other_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"whole.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [without_a_weight, under_other_names])
def test_weights_that_are_in_no_file_are_not_made_up(
    pico_base: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """As transformers does, with a warning: another model with each seed."""
    shutil.copytree(pico_base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    with pytest.raises(BadModel, match="lacks weights that LlamaForCausalLM has: they would be random numbers"):
        load_model(tmp_path / "base")


def test_experts_may_be_none_and_positions_many(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    edited("config.json", num_experts=0, n_shared_experts=0, max_position_embeddings=10**9)(tmp_path / "base")
    assert model_files(tmp_path / "base")


def test_names_of_built_in_implementations_pass(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    edited("config.json", attn_implementation="sdpa", _attn_implementation="eager")(tmp_path / "base")
    assert load_model(tmp_path / "base").num_parameters()


def test_only_what_belongs_to_a_model_is_taken(pico_base: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_base, tmp_path / "base")
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "base" / "modeling_evil.py").write_text("raise SystemExit")
    names = {file.name for file in model_files(tmp_path / "base")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"optimizer.pt", "modeling_evil.py"}


def test_scores_are_those_of_each_row_alone(pico_base: Path) -> None:
    """Against the plain model, one unpadded row at a time, with a log-softmax over all its logits."""
    model = AutoModelForCausalLM.from_pretrained(pico_base, dtype=torch.float32)
    torch.manual_seed(0)
    rows = []
    for length in (3, 9, 6):
        ids = torch.randint(5, 300, (length,)).tolist()
        rows.append(TokenRow(ids, [i % 2 == 1 for i in range(length)], 1))
    scored = score_tokens(model, rows)
    for i, row in enumerate(rows):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        logp = F.log_softmax(logits[:-1], -1).gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        expected = logp[torch.tensor(row.mask[1:])]
        torch.testing.assert_close(scored.logp[scored.row == i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scored.row_sums()[i], expected.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scored.row_means()[i], expected.mean(), rtol=1e-5, atol=1e-5)


def test_a_four_bit_model_still_has_gradients_after_it_was_only_looked_at(pico_base: Path) -> None:
    """bitsandbytes repacks the weights of a model in eval mode on some CPUs; what comes after has no gradient."""
    model = load_model(pico_base, QloraAdapter.model_validate(QLORA).base_quantization)
    layer = model.get_decoder().layers[0].mlp.up_proj
    inputs = torch.randn(3, 64, dtype=next(model.parameters()).dtype)

    def gradient() -> torch.Tensor:
        x = inputs.clone().requires_grad_()
        layer(x).float().sum().backward()
        assert x.grad is not None
        return x.grad

    layer.train()
    before = gradient()
    layer.eval()
    with torch.no_grad():
        layer(inputs)
    layer.train()
    assert before.abs().sum() > 0
    assert torch.equal(gradient(), before)


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f"), reason="this CPU has no AVX-512")
def test_widths_that_are_read_back_wrongly_are_refused(tmp_path: Path, pico_base: Path) -> None:
    """688 is a multiple of 16 but not of 64; should a later bitsandbytes read it right, this says so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=64, intermediate_size=688, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    assert load_model(tmp_path)
    with pytest.raises(BadModel, match="width 688"):
        load_model(tmp_path, QloraAdapter.model_validate(QLORA).base_quantization)
