"""Model folders: what may be in one, how it is loaded, and the log-probabilities that stages read off a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel
from tasks.core.ranks import shards_weights
from tasks.models.device import compute_dtype, device
from tasks.models.safetensors_reader import weight_map
from tasks.tokenization.architecture import architecture_in

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tasks.models.quantization import Quantization


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
)
"""What belongs to a model folder; anything else in one is left behind."""

Model: TypeAlias = "PreTrainedModel | PeftModel"
"""A model with or without an adapter of PEFT's on it."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face model folder that temper uses, after checking that it is safe and whole.

    Raises:
        BadModel: it is no model folder, has only pickle weights, needs to run its own code, or a shard is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise BadModel(
            "is not a model folder", where=str(folder), got="no config.json", fix="name a Hugging Face model folder"
        )
    for path in (config, folder / "tokenizer_config.json"):
        refuse_code(path)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise BadModel(
                "pickle weights are refused: loading them can run any code",
                where=str(folder),
                got=", ".join(pickles),
                expected="*.safetensors",
                fix="convert the weights to safetensors where you trust them",
            )
        raise BadModel("has no weights", where=str(folder), expected="*.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({shard for shard in weight_map(index).values() if not (folder / shard).is_file()})
        if missing:
            raise BadModel(
                "a shard named in the index is missing", where=str(folder), examples=missing, fix="fetch it again"
            )
    return sorted({p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()})


_WRITTEN_HERE = {"baichuan"}
"""Architectures that transformers lacks and temper has: what code their folders ask for is not needed, nor ever run."""


def refuse_code(path: Path) -> None:
    """Refuse a config.json or tokenizer_config.json that names custom code to run.

    Raises:
        BadModel: it does, or it is not valid JSON.
    """
    if not path.is_file():
        return
    content = read_object(path)
    asks = [key for key in content if key == "auto_map" or key.startswith("_attn_implementation")]
    if content.get("model_type") in _WRITTEN_HERE:
        asks = [key for key in asks if key != "auto_map"]
    if asks:
        raise BadModel(
            "asks to run its own code; refused", where=str(path), got=", ".join(asks), fix="remove these keys"
        )


def load_model(
    folder: Path, quantization: Quantization | None = None, *, full_precision: bool = False
) -> PreTrainedModel:
    """Load a language model of whichever kind from a folder, in this machine's compute dtype, ready to run.

    Args:
        folder: a Hugging Face model folder.
        quantization: asks for the weights in 4 or 8 bits.
        full_precision: asks for the weights in float32, whatever they are computed with.

    Raises:
        BadModel: the folder is unsafe, incomplete, or not of a known architecture.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from tasks.models.quantization import loading_config, prepare_for_training

    model_files(folder)
    loader = getattr(transformers, architecture_in(folder).loader)
    try:
        model: PreTrainedModel = loader.from_pretrained(
            folder,
            dtype=torch.float32 if full_precision else compute_dtype(),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": "cpu" if shards_weights() else device()},
            quantization_config=loading_config(quantization, compute_dtype()) if quantization else None,
        )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadModel(
            "does not load", where=str(folder), got=f"{type(error).__name__}: {error}".split("\n")[0]
        ) from error
    if quantization:
        prepare_for_training(model, quantization)
    model.requires_grad_(False)
    model.eval()
    return model
