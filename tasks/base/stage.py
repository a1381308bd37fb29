"""Put the base model into the workspace: a folder, a pinned hub revision, an import, or trained here.

Reads:  base.path: a model folder (local), a checkpoint and its tokenizer (checkpoint), the clean rows (pretrain,
        continue); the hub's cache or the hub itself (hub); the model that base.of pins (continue); data/templates/,
        unless the template is the model's own.
Writes: data/base/: a Hugging Face model folder (safetensors only) and manifest.json; log.jsonl, if it was trained here.
Params: base
Fails:  an unsafe, incomplete or unknown model, a wrong revision (65, never retried); a hub that does not answer (75).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base.continued_pretraining import continue_model, only_texts, rewrite, tokenizer_for
from tasks.base.params import AnyBase, CheckpointBase, ContinueBase, HubBase, PinnedBase, PretrainBase, Pretraining
from tasks.base.perplexity import PerplexityFigures
from tasks.base.pretraining import PAD, make_model
from tasks.base.torch_checkpoint import import_checkpoint
from tasks.base.vocabulary_extension import grow_rows
from tasks.core.artifacts import atomic_folder, check_manifest, digests
from tasks.core.errors import BadModel
from tasks.core.hub import snapshot
from tasks.core.stage import run_stage
from tasks.engine.checkpoints import checkpoint_folder
from tasks.models.loader import MODEL_FILES, load_model, model_files
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_in, architecture_of
from tasks.tokenization.template_form import dated
from tasks.tokenization.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATES = "data/templates"


def copy_model(source: Path, out: Path) -> None:
    """Copy what temper uses of a model folder, after checking it; one with a manifest must agree with that."""
    check_manifest(source)
    for file in model_files(source):
        shutil.copyfile(file, out / file.name)


def give_template(folder: Path, template: Path) -> list[str]:
    """Give a model folder another chat template, and the tokens that its first line names and the model lacks.

    Their embeddings begin as the mean of all others.

    Returns:
        The tokens that were added.

    Raises:
        BadModel: there is no such template, the tokenizer has no stop token that it could write, or the model is an
            encoder-decoder, which is given no chats.
    """
    from tokenizers import AddedToken

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
    tokenizer = read_tokenizer(folder)
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
    if added:
        model = load_model(folder, full_precision=True)
        grow_rows(model, {number: [] for token, number in tokenizer.get_vocab().items() if token in added})
        rewrite(model, folder)
    return added


def put(params: AnyBase | PinnedBase, folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Put the model that params name into an empty folder.

    Returns:
        What the manifest says of it beside params.
    """
    if isinstance(params, PretrainBase):
        return make_model(params, folder, checkpoints)
    if isinstance(params, ContinueBase):
        return put(params.of, folder, checkpoints) | continue_model(params, folder, checkpoints)
    if isinstance(params, CheckpointBase):
        import_checkpoint(params, folder)
    elif isinstance(params, HubBase):
        copy_model(snapshot(params.id, params.revision, MODEL_FILES, kind="model"), folder)
    else:
        copy_model(Path(params.path), folder)
    if isinstance(params, PinnedBase):
        check_pin(folder, params)
    about: dict[str, Any] = {}
    if params.template != "own":
        about["added_tokens"] = give_template(folder, Path(TEMPLATES, f"{params.template}.jinja"))
        if added := ", ".join(about["added_tokens"]):
            print(f"base: added {added}; adapters that leave embeddings frozen learn them poorly")
    if pin_date(folder, params.template_date):
        print(f"base: its chat template writes the date of the day; it is {params.template_date} now and for good")
    return about


def pin_date(folder: Path, day: str) -> bool:
    """Make the chat template of a model folder write this date whenever it is used; return whether it writes any."""
    tokenizer = read_tokenizer(folder)
    template = tokenizer.chat_template
    if not isinstance(template, str) or (written := dated(template, day)) == template:
        return False
    tokenizer.chat_template = written
    tokenizer.save_pretrained(folder)
    return True


def check_pin(folder: Path, params: PinnedBase) -> None:
    """Check that a copied model is the one that params pin.

    Raises:
        BadModel: it is another.
    """
    listed = "".join(f"{sha256}  {name}\n" for name, sha256 in digests(folder).items())
    found = hashlib.sha256(listed.encode()).hexdigest()
    if found != params.sha256:
        raise BadModel(
            "is not the model that base.of.sha256 names",
            where=params.path,
            got=found,
            expected=params.sha256,
            fix=f"set base.of.sha256={found} if this is the model that you mean",
        )


def check_loads(folder: Path, where: str, *, chats: bool) -> PreTrainedModel:
    """Load a finished folder's model, after checking that it fits its tokenizer and, for chats, can be tuned to them.

    Raises:
        BadModel: it does not load, has no chat template and needs one, has more tokens than embeddings, or does not say
            how targets begin.
    """
    tokenizer, model = tokenizer_for(folder, chats=chats), load_model(folder)
    known = model.config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise BadModel(
            "its tokenizer has more tokens than it has embeddings",
            where=where,
            got=f"{len(tokenizer)} tokens",
            expected=f"at most {known}",
        )
    if architecture_of(model) is ENCODER_DECODER and model.config.decoder_start_token_id is None:
        raise BadModel(
            "its configuration does not say with which token a target begins",
            where=where,
            expected="decoder_start_token_id in config.json (of T5 the padding token's number)",
        )
    return model


def main() -> None:
    """Run the stage `base`."""
    with run_stage(__doc__, "out", may_fetch=True) as stage:
        params = stage.section("base", AnyBase)
        about: dict[str, Any] = {"base": params.model_dump()}
        with atomic_folder(stage.path("out"), about) as folder:
            about |= put(params, folder, checkpoint_folder(stage.workspace, stage.key))
            chats = not isinstance(params, Pretraining) or not only_texts(Path(params.path))
            model = check_loads(folder, params.path, chats=chats)
        if "held_out" in about:
            print(f"base: held-out rows: {PerplexityFigures(**about['held_out'])}")
        print(f"base: {model.num_parameters():,} parameters from {params.kind} {params.path}", flush=True)
