"""Puts the base model into the workspace: from a local folder, from the hub at a pinned revision, or pretrained here.

Reads:  base.path: a model folder (local), the clean rows (pretrain); the hub's cache or the hub itself (hub);
        data/templates/, unless the template is the model's own.
Writes: data/base/: a Hugging Face model folder (safetensors only) and manifest.json.
Params: base
Fails:  an unsafe, incomplete or unknown model, a wrong revision (65, never retried); a hub that does not answer (75).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tasks import process
from tasks.architecture import ENCODER_DECODER, architecture_in, architecture_of
from tasks.checkpoints import checkpoint_folder
from tasks.device import settle
from tasks.errors import BadModel
from tasks.hub import snapshot
from tasks.models import MODEL_FILES, load_model, model_files
from tasks.outputs import MANIFEST, read_manifest, whole_folder
from tasks.params import HubBase, LocalBase, PretrainBase
from tasks.pretraining import PAD, document, model_card, new_model, pack_blocks, pretrain, train_tokenizer
from tasks.progress import Progress
from tasks.records import ChatExample, TextExample
from tasks.tables import read_records
from tasks.templates import load_tokenizer

TEMPLATES = "data/templates"


def copy_model(source: Path, out: Path) -> None:
    """Copies what temper uses of a model folder, after checking it; one with a manifest must agree with that."""
    if (source / MANIFEST).is_file():
        read_manifest(source)
    for file in model_files(source):
        shutil.copyfile(file, out / file.name)


def give_template(folder: Path, template: Path) -> list[str]:
    """Gives a model folder another chat template, and the tokens that its first line names and the model lacks.

    Their embeddings begin as the mean of all others.

    Returns:
        The tokens that were added.

    Raises:
        BadModel: there is no such template, the tokenizer has no stop token that it could write, or the model is an
            encoder-decoder, which is given no chats.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    if not template.is_file():
        known = ", ".join(sorted(path.stem for path in template.parent.glob("*.jinja")))
        raise BadModel("there is no such chat template", where=str(template), expected=f"own, {known}")
    if architecture_in(folder) is ENCODER_DECODER:
        raise BadModel(
            "an encoder-decoder model reads inputs without a chat template",
            where="base.template",
            got=template.stem,
            expected="own",
        )
    text = template.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = text
    named = re.match(r"\{# tokens: (.*?) #\}", text)
    known_tokens = tokenizer.get_vocab()
    wanted = named[1].split() if named else []
    if "eos_token" in text and tokenizer.eos_token is None:
        raise BadModel("its tokenizer has no stop token for this template to write", where=str(folder))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        wanted.append(PAD)
    added = [token for token in wanted if token not in known_tokens]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    if PAD in wanted:
        tokenizer.pad_token = PAD
    tokenizer.save_pretrained(folder)
    model = load_model(folder)
    before = model.config.vocab_size
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                weight: Any = layer.weight
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        model.save_pretrained(folder)
    return added


def check(folder: Path) -> int:
    """Loads a model folder and its tokenizer as every later stage does; returns how many parameters there are.

    Raises:
        BadModel: one of them does not load, or they do not fit each other.
    """
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise BadModel(
            "its tokenizer has more tokens than it has embeddings",
            where=str(folder),
            got=f"{len(tokenizer)} tokens",
            expected=f"at most {model.config.vocab_size}",
        )
    if architecture_of(model) is ENCODER_DECODER and model.config.decoder_start_token_id is None:
        raise BadModel(
            "its configuration does not say with which token a target begins",
            where=str(folder / "config.json"),
            expected="decoder_start_token_id (of T5 the padding token's number)",
        )
    return model.num_parameters()


def make_model(params: PretrainBase, out: Path, checkpoints: Path) -> None:
    """Pretrains a model on the clean text and chat rows and writes it with its tokenizer and a model card."""
    import torch

    records = [
        r for r in read_records(Path(params.path), ("text", "chat")) if isinstance(r, (TextExample, ChatExample))
    ]
    settle(params.seed)
    documents = [document(records[i]) for i in torch.randperm(len(records)).tolist()]
    tokenizer = train_tokenizer(documents[:50_000], params.vocabulary)
    blocks = pack_blocks(tokenizer, documents, params.context_tokens)
    model = new_model(params, tokenizer)
    steps = -(-params.tokens // params.batch_tokens)
    with Progress("pretrain", steps, "steps") as progress:
        log = pretrain(model, blocks, params, checkpoints, progress)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    (out / "README.md").write_text(model_card(params, log, model.num_parameters(), blocks.size))


def main() -> None:
    """The stage `base`."""
    with process.stage(__doc__, "out", may_fetch=True) as stage:
        params = stage.params.base
        about: dict[str, Any] = params.model_dump()
        with whole_folder(stage.path("out"), {"base": about}) as folder:
            if isinstance(params, LocalBase):
                copy_model(Path(params.path), folder)
            elif isinstance(params, HubBase):
                copy_model(snapshot(params.id, params.revision, MODEL_FILES, kind="model"), folder)
            else:
                make_model(params, folder, checkpoint_folder(stage.workspace, stage.key))
            if not isinstance(params, PretrainBase) and params.template != "own":
                added = give_template(folder, Path(TEMPLATES, f"{params.template}.jinja"))
                about["added_tokens"] = added
                if added:
                    print(f"base: added {', '.join(added)}; adapters that leave embeddings frozen learn them poorly")
            parameters = check(folder)
        print(f"base: {parameters:,} parameters from {params.kind} {params.path}", flush=True)


if __name__ == "__main__":
    main()
