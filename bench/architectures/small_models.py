"""The smallest random form of an architecture: its own configuration, with two layers of 32 numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SIZES = {
    32: (
        "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim hidden_size_global image_size "
        "expert_ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size moe_ffn_hidden_size ple_embed_dim adapter_out_dim out_hidden_size "
        "text_hidden_size"
    ),
    48: (
        "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim feed_forward_size "
        "shared_experts_intermediate_size"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_key_value_heads num_global_key_value_heads num_experts_per_tok moe_topk mamba_expand"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads n_routed_experts num_local_experts num_experts "
        "moe_num_experts mamba_n_heads index_n_heads"
    ),
    8: (
        "head_dim global_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim mamba_d_state state_size "
        "ssm_state_size hidden_size_per_layer_input"
    ),
    16: "kv_lora_rank q_lora_rank mamba_d_head patch_size",
    64: "index_topk",
    96: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx",
    1: "n_group topk_group",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_KINDS = ("layer_types", "layers_block_type")
_HYBRID = ["linear_attention", "full_attention"]

_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100, "encoder_hash_byte_group_size": [3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": {"rope_parameters": _SECTIONS},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "rope_theta": 1e4, "kv_n_heads": 2, "model_type": ""},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "mlp_layer_types": ["dense"] * 2},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": _SECTIONS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "xlm": {"causal": True},
    "xlstm": {"num_blocks": 2, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 4},
}
"""What else an architecture needs to be small, or to be at all."""
_ROTATES_BY_SECTIONS = frozenset(
    ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl")
)


def small_config(kind: type[PreTrainedConfig], changes: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Build the small configuration of a kind: nothing of it is larger, and no number is another without need."""
    from transformers import PreTrainedConfig

    default, known = kind(), {field.name for field in dataclasses.fields(kind)}
    meant = {own: name for name, own in kind.attribute_map.items()}
    given: dict[str, Any] = {}
    for name in known & vars(default).keys():
        value, size = vars(default)[name], _SMALL.get(name, _SMALL.get(meant.get(name, "")))
        if isinstance(value, PreTrainedConfig):
            given[name] = small_config(type(value))
        elif name in _TOKENS and (value is None or isinstance(value, int)):
            given[name] = _TOKENS[name] if value is not None or name == "pad_token_id" else None
        elif size and isinstance(value, int) and not isinstance(value, bool):
            given[name] = min(size, value) if value > 0 else size
        elif "drop" in name and isinstance(value, float):
            given[name] = 0.0
    for name in set(_KINDS) & known:
        kinds = list(dict.fromkeys(vars(default).get(name) or ()))
        if kinds:
            given[name] = kinds * 2 if len(kinds) == 1 else kinds
            given[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(given[name])
    if "kv_lora_rank" in known:  # each head has keys of its own
        given["num_key_value_heads"] = 4
    if kind.model_type.removesuffix("_text") in _ROTATES_BY_SECTIONS and "rope_parameters" in known:
        given["rope_parameters"] = _SECTIONS
    return kind(**{**given, **_OWN.get(kind.model_type, {}), **(changes or {})})


def save_small_model(
    name: str, folder: Path, *, sees: bool = False, changes: Mapping[str, Any] | None = None
) -> type[Any]:
    """Write the smallest random model of an architecture into a folder, in float32, and return its class.

    Args:
        name: its model_type.
        folder: where to.
        sees: whether it is the model that reads images, too.
        changes: of its configuration.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = small_config(CONFIG_MAPPING[name], changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for where, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 if "embed" in where else 0.2)
    model.save_pretrained(folder)
    return type(model)
