"""Continued pretraining: an existing model is trained further on the clean rows, with a larger vocabulary if wanted.

Full training updates every weight in float32. LoRA trains low-rank updates of the layers' matrices, and the rows of new
tokens; both are merged into the weights at the end, so that what comes out is a model like the one that went in. The
optimizer is AdamW, with which most models were pretrained: Muon gains little where it was not used before (Liu et al.
2025, arXiv:2502.16982, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.adapters.params import LoraAdapter
from tasks.adapters.peft_configs import peft_config
from tasks.base.corpus import Document, own_token_ids, pack_blocks, read_corpus, text_bytes
from tasks.base.params import AllWeights, ContinueBase, Growth, HubBase
from tasks.base.perplexity import PerplexityFigures, perplexity
from tasks.base.pretraining import (
    TOKENIZER_DOCUMENTS,
    course_rows,
    pretraining_card,
    steps_of,
    train_on_blocks,
    write_log,
)
from tasks.base.vocabulary_extension import add_merges, add_tokens, grow_rows
from tasks.core.errors import BadModel
from tasks.core.parquet import read_records
from tasks.core.progress import Progress
from tasks.core.records import TextExample
from tasks.models.device import seed_everything
from tasks.models.loader import load_model
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_in, positions_of
from tasks.tokenization.chat_template import load_tokenizer
from tasks.tokenization.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.models.loader import Model

CHATS = ("chat", "preference", "labelled")
"""The kinds of rows that the next stage renders by a chat template."""


def only_texts(clean: Path) -> bool:
    """Return whether no clean row needs a chat template."""
    return next(read_records(clean, CHATS), None) is None


def tokenizer_for(folder: Path, *, chats: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; it needs a chat template only where there are chats.

    Where there is one, texts end with the stop token of its replies, so that the model learns to write that.

    Raises:
        BadModel: it does not load, or has no template and should.
    """
    tokenizer = read_tokenizer(folder)
    return load_tokenizer(folder) if chats or tokenizer.chat_template else tokenizer


def continue_model(params: ContinueBase, folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Train the model in a folder further, in place; the folder gets a log and a model card.

    Returns:
        The held-out loss before and after, and the new tokens, for the manifest.

    Raises:
        BadModel: the model, its tokenizer or its context does not fit what params ask for.
        BadData: there is nothing to train on.
    """
    import torch

    if architecture_in(folder) is ENCODER_DECODER:
        raise BadModel(
            "an encoder-decoder cannot be trained further on texts: it reads inputs and writes targets",
            where="base.of",
            got=_origin(params),
            expected="a decoder",
            fix="name a decoder in base.of, or tune this model to pairs in `train`",
        )
    corpus = read_corpus(params)
    seed_everything(params.seed)
    documents = [corpus.train[i] for i in torch.randperm(len(corpus.train)).tolist()]
    chats = not only_texts(Path(params.path))
    tokenizer = tokenizer_for(folder, chats=chats)
    begun = load_model(folder)
    _check_context(begun, params)
    before = _measure(begun, tokenizer, corpus.held_out, params)
    new = grow(folder, params.growth, documents)
    tokenizer = tokenizer_for(folder, chats=chats)
    blocks = pack_blocks(own_token_ids(tokenizer, documents), params.context_tokens)
    seed_everything(params.seed)
    model = make_model_trainable(folder, params, sorted(new))
    with Progress("continue", steps_of(params), "steps") as progress:
        log = train_on_blocks(model, adamw(model, params.weight_decay), blocks, params, checkpoints, progress)
    parameters = save_model(model, folder, params, sorted(new))
    after = _measure(load_model(folder), tokenizer, corpus.held_out, params)
    figures = {
        name: found._asdict() for name, found in (("held_out_before", before), ("held_out", after)) if found is not None
    }
    write_log(folder, log, *({name: found} for name, found in figures.items()))
    rows = {"begun from": _origin(params), "parameters": f"{parameters:,}, trained with {params.adapter.name}"}
    rows["vocabulary"] = f"{len(tokenizer):,} tokens, {len(new):,} of them new"
    rows |= course_rows(params, log, blocks.size, "AdamW")
    if before and after:
        rows["held-out text"] = f"{after.rows:,} rows; before: {before}; after: {after}"
    (folder / "README.md").write_text(pretraining_card("A model trained further by temper", rows))
    return {**figures, "new_tokens": [str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(new)]}


def grow(folder: Path, growth: Growth, documents: Sequence[Document]) -> dict[int, list[int]]:
    """Add the new tokens that params list to a model folder: tokenizer, embedding, output head.

    Returns:
        The new ids, each with the old tokens that its rows began as; none for the mean of all.
    """
    if not growth.tokens and not growth.merges:
        return {}
    new: dict[int, list[int]] = {}
    if growth.tokens:
        tokenizer = read_tokenizer(folder)
        new |= add_tokens(tokenizer, growth.tokens)
        tokenizer.save_pretrained(folder)
    if growth.merges:
        new |= add_merges(folder, _texts(documents[:TOKENIZER_DOCUMENTS]), growth.merges)
    if growth.begin_as == "all":
        new = {number: [] for number in new}
    model = load_model(folder, full_precision=True)
    grow_rows(model, new)
    rewrite(model, folder)
    return new


def rewrite(model: PreTrainedModel, folder: Path) -> None:
    """Replace the weights of a model's folder by the model's, in the dtype that those in the folder have."""
    import torch
    from transformers import AutoConfig

    whole: Any = model
    whole.to(AutoConfig.from_pretrained(folder, local_files_only=True).dtype or torch.float32)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)


def make_model_trainable(folder: Path, params: ContinueBase, new: Sequence[int]) -> Model:
    """Load a folder's model with what is trained in float32: all weights, or LoRA and the rows of new tokens."""
    if isinstance(params.adapter, AllWeights):
        return load_model(folder, full_precision=True).requires_grad_(True)
    return with_lora(load_model(folder), params.adapter, new)


def with_lora(model: PreTrainedModel, adapter: LoraAdapter, new: Sequence[int]) -> PeftModel:
    """Add a fresh LoRA to a model and, if there are new tokens, rows of them that are trained beside it."""
    from peft import get_peft_model

    from tasks.adapters.fused_projections import keep_parts_apart

    config: Any = peft_config(adapter)
    if new:
        if getattr(model.get_output_embeddings(), "bias", None) is not None:  # PEFT leaves it out of its sum
            raise BadModel("new tokens cannot be trained by LoRA in a head with a bias", fix="set base.adapter to full")
        names = {module: name for name, module in model.named_modules()}
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        if layers[0].weight is layers[1].weight:
            layers.pop()  # PEFT ties it
        config.trainable_token_indices = {names[layer]: list(new) for layer in layers}
    try:
        adapted: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # TypeError: of a layer that is a target and holds new tokens' rows
        raise BadModel("the adapter does not fit this model", where="base.adapter", got=str(error)) from error
    _check_not_shared(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if isinstance(adapter.targets, dict):
        keep_parts_apart(adapted, adapter.targets)
    return adapted


def _check_not_shared(adapted: PeftModel) -> None:
    """Refuse LoRA on one of two layers that share their weight: merged into that, it would change the other too."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    weights = [weight for _, weight in adapted.named_parameters(remove_duplicate=False)]
    shared = [n for n, layer in layers.items() if sum(w is layer.get_base_layer().weight for w in weights) > 1]
    if shared:
        raise BadModel(
            "LoRA cannot be merged into a weight that the embedding and the output head share",
            where="base.adapter.targets",
            examples=[name.removeprefix("base_model.model.") for name in shared],
            fix="set base.adapter to full, or leave the embedding and the head out of base.adapter.targets",
        )


def adamw(model: Model, weight_decay: float) -> list[Optimizer]:
    """AdamW for what is trainable; only matrices decay, and of these not the embeddings."""
    import torch

    embeddings = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in parameters if p.ndim < 2 or id(p) in embeddings or ".trainable_tokens_delta." in name]
    kept = {id(p) for p in plain}
    decaying = [p for _, p in parameters if id(p) not in kept]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95))]


def save_model(model: Model, folder: Path, params: ContinueBase, new: Sequence[int]) -> int:
    """Write what was trained into the model's folder; LoRA is merged in float32.

    Returns:
        The number of parameters.
    """
    import torch

    whole: Any = model
    if not isinstance(params.adapter, AllWeights):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapted = with_lora(load_model(folder, full_precision=True), params.adapter, new)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        whole = adapted.merge_and_unload()
    rewrite(whole, folder)
    return int(whole.num_parameters())


def _check_context(model: PreTrainedModel, params: ContinueBase) -> None:
    longest = positions_of(model.config)
    if longest < params.context_tokens:
        raise BadModel(
            "reads fewer tokens than base.context_tokens",
            where=params.of.path,
            got=f"{longest} positions",
            expected=f"at least {params.context_tokens}",
            fix=f"lower base.context_tokens to {longest}",
        )


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], params: ContinueBase
) -> PerplexityFigures | None:
    return perplexity(
        model,
        list(own_token_ids(tokenizer, documents)),
        text_bytes(documents),
        context_tokens=params.context_tokens,
        batch_tokens=params.micro_batch_size * params.context_tokens,
    )


def _texts(documents: Sequence[Document]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, TextExample):
            yield document.text
        else:
            yield from (message.content for message in document.messages)


def _origin(params: ContinueBase) -> str:
    base = params.of
    return f"{base.id}@{base.revision}" if isinstance(base, HubBase) else f"{base.path} (sha256 {base.sha256})"
