"""What adapters do to weights, against what PEFT does to the model; and adapters that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.adapters.files import CONFIG, WEIGHTS
from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel
from tasks.deltas.base_tensors import check_mergeable, with_head
from tasks.deltas.weight_deltas import changes_of
from tasks.merge.merged_model import merge, write_merged
from tasks.models.safetensors_reader import stored_in

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 23)[None]


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **more})).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def merged(base: Path, adapter: Path, out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    out.mkdir()
    write_merged(base, adapter, {out: merge(base, adapter)}, 1 << 30)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


@pytest.mark.parametrize("fused", [False, True], ids=["a file per expert", "fused"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_merged_as_peft_computes_them(tmp_path: Path, family: str, fused: bool) -> None:
    """In memory their weights are one tensor; in files they may be one, or one for each expert."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model: Any
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=3))  # type: ignore[arg-type]
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**COMMON, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2, head_dim=8)  # type: ignore[arg-type, call-arg]
        )
    base = saved(model, tmp_path / "base", save_original_format=not fused)
    assert any(".experts.0." in name for name in stored_in(base)) is not fused
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=parameters)
    tuned = perturbed(get_peft_model(model, config))
    adapter = saved(tuned, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged(base, adapter, tmp_path / "out")), logits(tuned), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 20}}]
)
def test_experts_that_hold_in_by_out_and_are_square_are_merged_as_peft_computes_them(
    tmp_path: Path, patterns: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    shape = {**COMMON, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    model: Any = GptOssForCausalLM(GptOssConfig(**shape))  # type: ignore[arg-type]
    base = saved(model, tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=targets, **patterns)
    tuned = perturbed(get_peft_model(model, config))
    got = merged(base, saved(tuned, tmp_path / "adapter"), tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(tuned), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("says", [True, False])
def test_which_way_a_weight_lies_the_family_tells_and_not_the_configuration(tmp_path: Path, says: bool) -> None:
    """PEFT corrects `fan_in_fan_out` layer by layer, and saves what the last layer wanted."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    base = saved(model, tmp_path / "base")
    tuned = perturbed(get_peft_model(model, LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"])))
    adapter = saved(tuned, tmp_path / "adapter")
    told = read_object(adapter / CONFIG)
    (adapter / CONFIG).write_text(json.dumps({**told, "fan_in_fan_out": says}))
    torch.testing.assert_close(logits(merged(base, adapter, tmp_path / "out")), logits(tuned), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}])
@pytest.mark.parametrize("kind", ["adalora", "ia3"])
def test_modules_that_other_methods_train_along_are_merged(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    from peft import AdaLoraConfig, IA3Config, get_peft_model

    model = llama()
    base = saved(model, tmp_path / "base")
    config: Any = (
        AdaLoraConfig(total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], **more)
        if kind == "adalora"
        else IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **more)
    )
    tuned = perturbed(get_peft_model(model, config))
    adapter = saved(tuned, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged(base, adapter, tmp_path / "out")), logits(tuned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_single_tokens_of_a_vocabulary_that_grew_are_merged(tmp_path: Path, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama(tie_word_embeddings=tied)
    base = saved(model, tmp_path / "base")
    model.resize_token_embeddings(66, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 64, 65])
    tuned = perturbed(get_peft_model(model, config))
    adapter = saved(tuned, tmp_path / "adapter", save_embedding_layers=True)
    torch.testing.assert_close(logits(merged(base, adapter, tmp_path / "out")), logits(tuned), rtol=1e-4, atol=1e-5)
    saved(tuned, tmp_path / "alone")  # without the rows of the vocabulary that grew
    with pytest.raises(BadModel, match="does not fit this base"):
        merge(base, tmp_path / "alone")


def test_single_tokens_are_also_the_head_s_where_it_is_the_embedding_and_stored_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama(tie_word_embeddings=True)
    base = saved(model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tuned = perturbed(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])))
    adapter = saved(tuned, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged(base, adapter, tmp_path / "out")), logits(tuned), rtol=1e-4, atol=1e-5)


def test_a_head_of_its_own_in_the_file_is_believed_whatever_the_configuration_says(tmp_path: Path) -> None:
    """As transformers loads it; the merged model says so in both places, so that every release of it does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = saved(llama(tie_word_embeddings=True), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = perturbed(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
    got = merged(base, saved(tuned, tmp_path / "adapter"), tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(tuned), rtol=1e-4, atol=1e-5)
    assert torch.equal(got.lm_head.weight, weights["lm_head.weight"])
    assert read_object(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False


def test_the_tokenizer_that_an_adapter_brings_comes_whole(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
        (base / name).write_text('{"of": "base"}')
    lora = {f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{p}.weight": torch.zeros(s)
            for n in (0, 1) for p, s in (("A", (2, 32)), ("B", (32, 2)))}  # fmt: skip
    adapter = written(tmp_path / "adapter", lora, target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text('{"of": "adapter", "chat_template": "{{ 1 }}"}')
    merged(base, adapter, tmp_path / "out")
    assert "adapter" in (tmp_path / "out" / "tokenizer.json").read_text()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


LORAS: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 40]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "pattern": {
        "target_modules": r".*layers\.1\..*(q|k)_proj",
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {r"1\..*q_proj": 3},
    },
    "excluded": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*"},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "update of bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LORAS)
def test_every_part_of_a_lora_is_merged(tmp_path: Path, name: str, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama(tie_word_embeddings=tied, attention_bias="bias" in name)
    base = saved(model, tmp_path / "base")
    tuned = perturbed(get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **LORAS[name])))
    adapter = saved(tuned, tmp_path / "adapter")
    got = merged(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(got), logits(tuned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_grew_is_merged(tmp_path: Path, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama(tie_word_embeddings=tied)
    base = saved(model, tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    trained = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=trained, ensure_weight_tying=tied)
    tuned = perturbed(get_peft_model(model, config))
    adapter = saved(tuned, tmp_path / "adapter")
    got = merged(base, adapter, tmp_path / "out")
    assert got.config.vocab_size == 70
    torch.testing.assert_close(logits(got), logits(tuned), rtol=1e-4, atol=1e-5)


def test_rows_of_added_tokens_follow_those_of_the_base(tmp_path: Path) -> None:
    """As vLLM wants them: only the new rows, with the ids in added_tokens.json."""
    base = saved(llama(), tmp_path / "base")
    tensors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(32, 2),
        "base_model.model.model.embed_tokens.weight": torch.randn(3, 32),
        "base_model.model.lm_head.weight": torch.randn(3, 32),
    }
    adapter = written(tmp_path / "adapter", tensors, target_modules=["q_proj"], layers_to_transform=[0])
    (adapter / "added_tokens.json").write_text(json.dumps({"<a>": 64, "<b>": 65, "<c>": 66}))
    got = merged(base, adapter, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    for name, weight in (
        ("model.embed_tokens.weight", got.model.embed_tokens.weight),
        ("lm_head.weight", got.lm_head.weight),
    ):
        assert torch.equal(weight, torch.cat([before[name], tensors[f"base_model.model.{name}"]]))
    (adapter / "added_tokens.json").write_text(json.dumps({"<a>": 60, "<b>": 61, "<c>": 62}))
    with pytest.raises(BadModel, match="does not fit this base"):
        merge(base, adapter)


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


def test_a_real_adapter_whose_rows_its_tokenizer_does_not_explain_is_refused(real_data: Path, tmp_path: Path) -> None:
    """It has five rows of embeddings, and its added_tokens.json one token."""
    folder = real_data / "fms_artifacts" / "tuned_llama_with_added_tokens"
    base = saved(llama(vocab_size=32000, hidden_size=64, num_hidden_layers=1), tmp_path / "base")
    with pytest.raises(BadModel, match=r"shape \(5, 64\), the base has \(32000, 64\), added_tokens.json adds 1"):
        changes_of(folder, with_head(stored_in(base), {}))


# --- adapters that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("fitting")
    model = llama()
    base = saved(model, folder / "base")
    tuned = perturbed(get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])))
    return base, saved(tuned, folder / "adapter")


BROKEN_SETTINGS: dict[str, dict[str, Any]] = {
    "r": {"r": 0},
    "r as text": {"r": "x"},
    "rank_pattern": {"rank_pattern": {"q_proj": "many"}},
    "alpha_pattern": {"alpha_pattern": ["q_proj"]},
    "a pattern": {"target_modules": "(["},
    "target_modules": {"target_modules": 5},
}


@pytest.mark.parametrize("name", BROKEN_SETTINGS)
def test_a_configuration_with_values_that_mean_nothing_is_refused(
    fitting: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    base, adapter = fitting
    shutil.copytree(adapter, tmp_path / "adapter")
    config = {**read_object(adapter / CONFIG), **BROKEN_SETTINGS[name]}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadModel, match="has values that mean nothing"):
        changes_of(tmp_path / "adapter", stored_in(base))


def edited(tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> None:
    first, second = (
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.1.self_attn.v_proj",
    )
    edits: dict[str, Callable[[], Any]] = {
        "no key matches": lambda: rename(tensors, "self_attn", "attention"),
        "half are missing": lambda: [tensors.pop(f"{second}.lora_{part}.weight") for part in "AB"],
        "b is missing": lambda: tensors.pop(f"{first}.lora_B.weight"),
        "stray": lambda: tensors.update({f"{first}.lora_C.weight": torch.zeros(2)}),
        "rank": lambda: config.update(r=8),
        "width": lambda: tensors.update({f"{first}.lora_A.weight": torch.zeros(2, 16)}),
        "not a number": lambda: tensors[f"{first}.lora_A.weight"].fill_(float("nan")),
        "alpha": lambda: config.update(lora_alpha=float("nan")),
        "kind": lambda: config.update(peft_type="FOO"),
        "pissa": lambda: config.update(init_lora_weights="pissa"),
        "replicated": lambda: config.update(layer_replication=[[0, 2], [0, 2]]),
        "dora": lambda: config.update(use_dora=True),
        "a norm grew": lambda: tensors.update({"base_model.model.model.norm.weight": torch.zeros(64)}),
    }
    edits[name]()


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


REFUSED = {
    "no key matches": "0 of 8 adapter tensors match this base model",
    "half are missing": r"6 of 6 adapter tensors match this base model, and 1 weights that it should change have none",
    "b is missing": "does not fit this base",
    "stray": "not a part of LORA",
    "rank": "adapter_config says r = 8, but tensors have r = 2",
    "width": r"shape \(2, 16\), expected \(2, 32\)",
    "not a number": "has 64 values that are not finite; refused",
    "alpha": "lora_alpha = nan",
    "kind": "is of a method that cannot be merged",
    "pissa": "cannot be merged",
    "replicated": "cannot be merged",
    "dora": "lora_magnitude_vector: missing, and use_dora is True",
    "a norm grew": r"norm.weight: shape \(64,\), the base has \(32,\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(fitting: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = fitting
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors, config = load_file(adapter / WEIGHTS), read_object(adapter / CONFIG)
    edited(tensors, config, name)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(BadModel, match=REFUSED[name]):
        changes_of(tmp_path / "adapter", stored_in(base))


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 4}, {"num_hidden_layers": 1}, {"hidden_size": 64}])
def test_an_adapter_of_a_base_of_another_shape_is_refused(
    fitting: tuple[Path, Path], tmp_path: Path, shape: dict[str, int]
) -> None:
    base = saved(llama(**shape), tmp_path / "base")
    with pytest.raises(BadModel, match=r"match this base model|does not fit this base"):
        changes_of(fitting[1], stored_in(base))


def test_a_quantized_base_is_refused(fitting: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = fitting
    shutil.copytree(base, tmp_path / "base")
    config = read_object(base / "config.json")
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"load_in_4bit": True}})
    )
    with pytest.raises(BadModel, match="is quantized: merging into it would lose precision"):
        merge(tmp_path / "base", adapter)


def test_patterns_are_read_as_peft_reads_them() -> None:
    from peft.utils.other import get_pattern_key

    from tasks.deltas.peft_config import own

    patterns = {"q_proj": 1, r"layers\.1\..*k_proj": 2, "model.layers.0.mlp.up_proj": 3, "proj": 4}
    modules = [
        f"model.layers.{n}.{part}"
        for n in (0, 1, 11)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    for module in [*modules, "q_proj", "xq_proj"]:
        assert own(patterns, module, 0) == patterns.get(get_pattern_key(patterns.keys(), module), 0)


def routed(family: str) -> Any:
    """Models some of whose linear layers are parameters of experts, do more than multiply, or have two names."""
    import transformers as t

    torch.manual_seed(0)
    few = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    experts = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    made: dict[str, Callable[[], Any]] = {
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**COMMON, num_local_experts=4)),  # type: ignore[arg-type]
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**COMMON, **experts, num_experts=4, head_dim=8)),  # type: ignore[arg-type, call-arg]
        "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(**few, **experts, **latent, **groups, num_key_value_heads=4)  # type: ignore[arg-type]
        ),
        "llama4": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(**COMMON, intermediate_size_mlp=48, num_local_experts=4, head_dim=8)  # type: ignore[arg-type]
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**few)),  # type: ignore[arg-type]
    }
    return made[family]().eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4", "gpt_neox"])
def test_all_linear_layers_of_every_kind_are_merged(tmp_path: Path, family: str) -> None:
    """As training makes the adapter, proved before it by shapes, and as PEFT computes it after."""
    from tasks.adapters.attach import init_adapter, save_adapter
    from tasks.adapters.params import LoraAdapter
    from tests.helpers.samples import LORA

    base = saved(routed(family), tmp_path / "base")
    targets = ["query_key_value", "lm_head"] if family == "gpt_neox" else "all-linear"  # its files say embed_out
    adapted = perturbed(init_adapter(base, LoraAdapter.model_validate({**LORA, "targets": targets})))
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted, tmp_path / "adapter")
    check_mergeable(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    assert not torch.allclose(expected, logits(routed(family)), atol=1e-2)
    torch.testing.assert_close(
        logits(merged(base, tmp_path / "adapter", tmp_path / "out")), expected, atol=1e-5, rtol=0
    )


def test_what_could_not_be_merged_is_found_before_it_is_trained(tmp_path: Path) -> None:
    from tasks.adapters.attach import init_adapter
    from tasks.adapters.params import LoraAdapter
    from tasks.train.stage import prove_mergeable
    from tests.helpers.samples import LORA

    base = saved(llama(), tmp_path / "base")
    model = init_adapter(base, LoraAdapter.model_validate(LORA))
    prove_mergeable(model, base)
    wider = saved(llama(intermediate_size=56), tmp_path / "wider")
    with pytest.raises(BadModel, match="does not fit this base"):
        prove_mergeable(model, wider)
