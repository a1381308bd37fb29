"""Further forms of a merged model: other number formats, GGUF with an Ollama Modelfile, a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from tasks.adapters.package import FOLDER
from tasks.core.artifacts import as_json, read_object
from tasks.core.errors import BadModel
from tasks.merge.export.gguf import context_of, write_gguf
from tasks.merge.export.ollama import modelfile
from tasks.merge.merged_model import merge_changes, write_merged
from tasks.merge.params import Export, GgufExport, HubExport, SafetensorsExport
from tasks.models.safetensors_reader import MIB
from tasks.publish.hub_upload import push
from tasks.tokenization.chat_template import load_tokenizer

GGUF, MODELFILE, PUSHED = "model.gguf", "Modelfile", "hub.json"


def export(model: Path, wanted: Export, folder: Path) -> str:
    """Write one form of a model folder into a new folder; return a description of it.

    Raises:
        BadModel: the model cannot have this form.
        Transient: the hub does not answer.
    """
    folder.mkdir(parents=True)
    if isinstance(wanted, HubExport):
        pushed = push(model, wanted.id, private=wanted.private, message="Upload with temper")
        (folder / PUSHED).write_text(as_json({"id": wanted.id, "commit": pushed.commit}))
        return f"hub:{wanted.id}@{pushed.commit}"
    if (model / FOLDER).is_dir():
        raise BadModel(
            f"cannot be exported as {wanted.kind}: its adapter is beside the weights, not in them",
            where=str(model),
            fix="take this export out, or a method that can be merged",
        )
    if isinstance(wanted, SafetensorsExport):
        made = merge_changes(model, lambda base, family: {}, wanted.dtype)
        write_merged(model, model, {folder: made}, wanted.max_shard_mib * MIB)
        return f"safetensors in {wanted.dtype}"
    return _gguf(model, wanted, folder)


def _gguf(model: Path, wanted: GgufExport, folder: Path) -> str:
    write_gguf(model, folder / GGUF, wanted.dtype)
    if wanted.ollama:
        longest = context_of(read_object(model / "config.json"))
        (folder / MODELFILE).write_text(modelfile(load_tokenizer(model), GGUF, longest))
    return f"GGUF in {wanted.dtype}"
