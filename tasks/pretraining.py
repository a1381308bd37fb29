"""A small Llama from nothing: its byte-level BPE tokenizer, packed blocks, and the training.

Matrices inside the layers are trained with Muon, which orthogonalises the momentum (Jordan et al. 2024; its update
scaled to AdamW's as in Liu et al. 2025, arXiv:2502.16982), embeddings and norms with AdamW; bench/LOG.md has the
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.device import compute_dtype, device
from tasks.errors import BadData
from tasks.loop import Course, run, schedule
from tasks.params import PretrainBase
from tasks.progress import Progress
from tasks.records import ChatExample, TextExample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PAD, TURN, STOP = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, with every digit one and ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, TURN, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=STOP, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def document(record: TextExample | ChatExample) -> str:
    """A row as the text that is trained on: plain text as it is, a chat in the form of the chat template."""
    if isinstance(record, TextExample):
        return record.text + STOP
    return "".join(f"{TURN}{role}\n{content}{STOP}\n" for role, content, *_ in record.messages)


def pack_blocks(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], context_tokens: int
) -> np.ndarray[Any, Any]:
    """All documents end to end, cut into blocks: (blocks, context_tokens), int64; the rest at the end is dropped.

    Raises:
        BadData: there is not one block's worth of text.
    """
    import numpy as np

    ids: list[int] = []
    for start in range(0, len(documents), 10_000):
        for row in tokenizer(list(documents[start : start + 10_000]), add_special_tokens=False)["input_ids"]:
            ids += row
    blocks = len(ids) // context_tokens
    if not blocks:
        raise BadData("too little text to pretrain on", got=f"{len(ids)} tokens", expected=f"at least {context_tokens}")
    return np.array(ids[: blocks * context_tokens]).reshape(blocks, context_tokens)


def new_model(params: PretrainBase, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights, in fp32, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=params.hidden_size,
        intermediate_size=params.mlp_size,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        max_position_embeddings=2 * params.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # transformers' fused attention is slower than its plain one on a CPU at this size, above all backwards
    # (bench/LOG.md)
    attention = "eager" if device().type == "cpu" else "sdpa"
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return model


def pretrain(
    model: LlamaForCausalLM, blocks: np.ndarray[Any, Any], params: PretrainBase, checkpoints: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Trains the model in place, in bf16 where this machine is fast at it; goes on from the newest checkpoint.

    Args:
        model: a model with fp32 weights.
        blocks: token ids, (blocks, context_tokens), int64; all of them are the target.
        params: the batch, the rate and the number of tokens.
        checkpoints: where they are kept.
        progress: shows the steps.

    Returns:
        The log of the loop, one row per step.
    """
    import torch
    from torch.nn import functional as F

    parameters = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and ".layers." in name}
    others = [p for name, p in parameters.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices.values(), weight_decay=params.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    dtype, target = compute_dtype(), device()
    model.to(target).train()  # type: ignore[arg-type]
    steps = math.ceil(params.tokens / params.batch_tokens)
    batch = params.batch_tokens // params.context_tokens
    place = Shuffle(len(blocks), params.seed)

    def chosen(step: int) -> list[int]:
        return [place(n) for n in range(step * batch, (step + 1) * batch)]

    def losses(step: int) -> list[tuple[Tensor, dict[str, float]]]:
        ids = torch.from_numpy(blocks[chosen(step)]).to(target)  # (batch, context)
        with torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1])
        return [(F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()), {})]

    course = Course(
        steps=steps,
        learning_rate=lambda step: schedule(
            step, steps, peak=params.learning_rate, warmup_steps=params.warmup_steps, shape="cosine"
        ),
        losses=losses,
        describe=lambda step: [f"block {block}" for block in chosen(step)],
        max_grad_norm=1.0,
        checkpoint_every_steps=params.checkpoint_every_steps,
    )
    return run(course, parameters, optimizers, checkpoints, progress)


class Shuffle:
    """The n-th item of endless shuffles of the same items: each is seen once before any is seen again."""

    def __init__(self, items: int, seed: int) -> None:
        self.items, self.seed = items, seed
        self._epoch, self._order = -1, [0]

    def __call__(self, n: int) -> int:
        """The item at place n, from 0."""
        import torch

        epoch, place = divmod(n, self.items)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.items, generator=generator).tolist()
        return self._order[place]


def model_card(params: PretrainBase, log: Sequence[dict[str, Any]], parameters: int, corpus_tokens: int) -> str:
    """What a pretrained model is, in Markdown: its shape, what it saw, and how well it predicts that."""
    last = log[-100:]
    loss = sum(row["loss"] for row in last) / len(last)
    heads = f"{params.heads} heads ({params.kv_heads} for keys and values)"
    shape = f"{params.layers} layers, hidden size {params.hidden_size}, MLP {params.mlp_size}, {heads}"
    rows = {
        "parameters": f"{parameters:,} ({shape}, vocabulary {params.vocabulary}, tied embeddings)",
        "text": f"{corpus_tokens:,} tokens, packed into blocks of {params.context_tokens}",
        "tokens seen": f"{len(log) * params.batch_tokens:,} in {len(log):,} steps of {params.batch_tokens:,}",
        "loss": f"{loss:.4f} nats per token, mean of the last {len(last)} steps",
        "optimizer": f"Muon and AdamW, peak rate {params.learning_rate:g}, cosine, {params.warmup_steps} warm-up steps",
        "seed": str(params.seed),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# A small Llama made by temper\n\n| | |\n|---|---|\n{table}\n\nDigests of all files: `manifest.json`.\n"
