"""A Llama from nothing: its byte-level BPE tokenizer, its shape, and the training on packed blocks.

Matrices inside the layers are trained with Muon, which orthogonalises the momentum (Jordan et al. 2024; its update
scaled to AdamW's as in Liu et al. 2025, arXiv:2502.16982), embeddings and norms with AdamW; bench/LOG.md has the
comparison.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base.corpus import DOCUMENTS_AT_ONCE, Document, pack_blocks, read_corpus, text_bytes
from tasks.base.params import PretrainBase, Pretraining
from tasks.base.perplexity import PerplexityFigures, next_token_logp, perplexity
from tasks.core.progress import Progress
from tasks.core.records import TextExample
from tasks.engine.loop import TrainingPlan, train_loop
from tasks.engine.loss_scale import loss_scale
from tasks.engine.schedules import learning_rates
from tasks.models.device import choices, device, seed_everything, upload

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from tasks.models.loader import Model

PAD, TURN, STOP = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""

TOKENIZER_DOCUMENTS = 50_000
"""Documents that a tokenizer is trained on, at most."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens, with single digits and ChatML's tokens."""
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


def document(record: Document) -> str:
    """Return a row as the text that is trained on: plain text as it is, a chat in the form of the chat template."""
    if isinstance(record, TextExample):
        return record.text + STOP
    return "".join(f"{TURN}{role}\n{content}{STOP}\n" for role, content, *_ in record.messages)


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[list[int]]:
    """Yield documents' token ids in the form that a model of ours is pretrained on."""
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        texts = [document(record) for record in documents[start : start + DOCUMENTS_AT_ONCE]]
        yield from tokenizer(texts, add_special_tokens=False)["input_ids"]


def new_model(params: PretrainBase, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build a Llama with random weights, in fp32, with tied embeddings."""
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
    attention = "eager" if device().type == "cpu" else choices().attention
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return model


def muon_and_adamw(parameters: Mapping[str, Tensor], weight_decay: float) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; only the matrices decay."""
    import torch

    matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and ".layers." in name}
    others = [p for name, p in parameters.items() if name not in matrices]
    best = choices(others[0].device)
    return [
        torch.optim.Muon(matrices.values(), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=best.fused_optimizer or None),
    ]


def train_on_blocks(
    model: Model,
    optimizers: Sequence[Optimizer],
    blocks: np.ndarray[Any, Any],
    params: Pretraining,
    checkpoints: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train what is trainable in place, in 16 bits where this machine is fast at it; go on from the newest checkpoint.

    Args:
        model: a model on this machine's device; what is trained has fp32 weights.
        optimizers: they hold all its trainable parameters.
        blocks: token ids, (blocks, context_tokens), int32; all of them but the first are the target.
        params: the batch, the rate and the number of tokens.
        checkpoints: where they are kept.
        progress: shows the steps.

    Returns:
        The log of the loop, one row per step.
    """
    import torch

    model.train()
    batch, steps = params.batch_tokens // params.context_tokens, steps_of(params)
    place = Shuffle(len(blocks), params.seed)

    def chosen(step: int) -> list[int]:
        return [place(n) for n in range(step * batch, (step + 1) * batch)]

    def losses(step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        picked = chosen(step)
        predicted = batch * (params.context_tokens - 1)
        for start in range(0, batch, params.micro_batch_size):
            rows = torch.from_numpy(blocks[picked[start : start + params.micro_batch_size]]).long()
            ids = upload(rows, model.device)
            yield -next_token_logp(model, ids).sum() / predicted, {}

    course = TrainingPlan(
        steps=steps,
        learning_rate=learning_rates(
            params.schedule, peak=params.learning_rate, warmup_steps=params.warmup_steps, steps=steps
        ),
        losses=losses,
        describe=lambda step: [f"block {block}" for block in chosen(step)],
        max_grad_norm=1.0,
        checkpoint_every_steps=params.checkpoint_every_steps,
    )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return train_loop(course, trainable, optimizers, checkpoints, progress, scale=loss_scale())


def steps_of(params: Pretraining) -> int:
    """Return the number of steps that see all the tokens."""
    return math.ceil(params.tokens / params.batch_tokens)


def make_model(params: PretrainBase, out: Path, checkpoints: Path) -> dict[str, Any]:
    """Pretrain a model on the clean rows and write it with its tokenizer, its log and a model card.

    Returns:
        The held-out loss at the end, for the manifest.
    """
    import torch

    corpus = read_corpus(params)
    seed_everything(params.seed)
    documents = [corpus.train[i] for i in torch.randperm(len(corpus.train)).tolist()]
    tokenizer = train_tokenizer((document(record) for record in documents[:TOKENIZER_DOCUMENTS]), params.vocabulary)
    blocks = pack_blocks(token_ids(tokenizer, documents), params.context_tokens)
    model = new_model(params, tokenizer)
    model.to(device())  # type: ignore[arg-type]
    optimizers = muon_and_adamw(dict(model.named_parameters()), params.weight_decay)
    with Progress("pretrain", steps_of(params), "steps") as progress:
        log = train_on_blocks(model, optimizers, blocks, params, checkpoints, progress)
    found = perplexity(
        model.bfloat16().float(),  # what is published, computed as in training
        list(token_ids(tokenizer, corpus.held_out)),
        text_bytes(corpus.held_out),
        context_tokens=params.context_tokens,
        batch_tokens=params.micro_batch_size * params.context_tokens,
    )
    tokenizer.save_pretrained(out)
    model.bfloat16().save_pretrained(out)
    held_out = {"held_out": found._asdict()} if found else {}
    write_log(out, log, held_out)
    (out / "README.md").write_text(model_card(params, log, model.num_parameters(), blocks.size, found))
    return held_out


def write_log(out: Path, log: Sequence[Mapping[str, Any]], *figures: Mapping[str, Any]) -> None:
    """Write log.jsonl: a row for each step, then rows of what was measured before or after."""
    (out / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in (*log, *figures) if row))


class Shuffle:
    """The n-th item of endless shuffles of the same items: each is seen once before any is seen again."""

    def __init__(self, items: int, seed: int) -> None:
        self.items, self.seed = items, seed
        self._epoch, self._order = -1, [0]

    def __call__(self, n: int) -> int:
        """Return the item at place n, from 0."""
        import torch

        epoch, place = divmod(n, self.items)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.items, generator=generator).tolist()
        return self._order[place]


def model_card(
    params: PretrainBase,
    log: Sequence[Mapping[str, Any]],
    parameters: int,
    corpus_tokens: int,
    held_out: PerplexityFigures | None,
) -> str:
    """Describe a pretrained model in Markdown: its shape, its data, and how well it predicts that and other text."""
    heads = f"{params.heads} heads ({params.kv_heads} for keys and values)"
    shape = f"{params.layers} layers, hidden size {params.hidden_size}, MLP {params.mlp_size}, {heads}"
    rows = {"parameters": f"{parameters:,} ({shape}, vocabulary {params.vocabulary}, tied embeddings)"}
    rows |= course_rows(params, log, corpus_tokens, "Muon and AdamW")
    if held_out:
        rows["held-out text"] = f"{held_out}, over {held_out.tokens:,} tokens of {held_out.rows:,} rows"
    return pretraining_card("A small Llama made by temper", rows)


def course_rows(
    params: Pretraining, log: Sequence[Mapping[str, Any]], corpus_tokens: int, optimizer: str
) -> dict[str, str]:
    """Return the rows of a model card about the training."""
    last = log[-100:]
    shape = params.schedule if isinstance(params.schedule, str) else "warm-up, stable, decay"
    rate = f"peak rate {params.learning_rate:g}, {shape}, {params.warmup_steps} warm-up steps"
    loss = sum(row["loss"] for row in last) / len(last)
    return {
        "text": f"{corpus_tokens:,} tokens, packed into blocks of {params.context_tokens}",
        "tokens seen": f"{len(log) * params.batch_tokens:,} in {len(log):,} steps of {params.batch_tokens:,}",
        "loss": f"{loss:.4f} nats per token, mean of the last {len(last)} steps",
        "optimizer": f"{optimizer}, {rate}",
        "seed": str(params.seed),
    }


def pretraining_card(title: str, rows: Mapping[str, str]) -> str:
    """Format a model card: a title and a table."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# {title}\n\n| | |\n|---|---|\n{table}\n\nDigests of all files: `manifest.json`.\n"
