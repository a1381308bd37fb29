"""Baichuan with rotary positions (7B; arXiv:2309.10305), whose own code would have to be fetched and trusted otherwise.

A Llama whose queries, keys and values are one projection, `W_pack`. Baichuan 2 compares hidden states with the head's
rows at unit length. The 13B models have other positions (ALiBi) and are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

KIND = "baichuan"
VOCABULARY_OF_2 = 125_696
"""What tells Baichuan 2 from the first: their configurations have the same fields."""


class BaichuanConfig(LlamaConfig):
    """The fields of Llama's; those of the 13B models lack max_position_embeddings, for ALiBi needs none."""

    model_type = KIND

    def __init__(self, max_position_embeddings: int = 0, **fields: Any) -> None:
        if not max_position_embeddings and "model_max_length" in fields:
            raise ValueError("Baichuan with ALiBi (13B) is not supported")
        super().__init__(max_position_embeddings=max_position_embeddings or 2048, **fields)


class BaichuanAttention(LlamaAttention):
    """Llama's attention with one projection for queries, keys and values, in this order."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(  # type: ignore[override]  # transformers lists every option of every kernel
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (batch, tokens, hidden) in and out, and the attention weights where they are kept."""
        batch, tokens, hidden = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, tokens, 3, -1, self.head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        found, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **more)
        return self.o_proj(found.reshape(batch, tokens, hidden)), weights


class UnitHead(nn.Linear):
    """A vocabulary head whose rows have length one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (..., hidden) to logits (..., vocabulary)."""
        return F.linear(hidden_states, F.normalize(self.weight))


class BaichuanForCausalLM(LlamaForCausalLM):
    """The decoder with its vocabulary head."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.self_attn = BaichuanAttention(config, number)
        if config.vocab_size == VOCABULARY_OF_2:
            self.lm_head = UnitHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def make_known() -> None:
    """Register Baichuan with transformers' Auto classes."""
    AutoConfig.register(KIND, BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
