"""Model folders: what may be in one, how it is loaded, and the log-probabilities that stages read off a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tasks.core.errors import BadModel
from tasks.core.memory import ran_out
from tasks.core.ranks import shards_weights
from tasks.models.device import choices, compute_dtype, device
from tasks.models.safetensors_reader import weight_map
from tasks.tokenization.architecture import loader_of
from tasks.tokenization.model_config import check_sizes, does_not_load, read_config, refuse_code

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
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
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
    for path in (config, *(folder / name for name in MODEL_FILES if name.endswith("r_config.json"))):
        refuse_code(path)
    check_sizes(config)
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


def load_model(
    folder: Path, quantization: Quantization | None = None, *, full_precision: bool = False
) -> PreTrainedModel:
    """Load a language model of whichever kind from a folder, in this machine's compute dtype, ready to run.

    Args:
        folder: a Hugging Face model folder.
        quantization: asks for the weights in 4 or 8 bits.
        full_precision: asks for the weights in float32, whatever they are computed with.

    Raises:
        BadModel: the folder is unsafe, incomplete (also by a single weight), or not of a known architecture.
    """
    import torch

    from tasks.models.quantization import loading_config, prepare_for_training

    model_files(folder)
    loader = loader_of(read_config(folder))
    try:
        model: PreTrainedModel
        model, told = loader.from_pretrained(
            folder,
            dtype=torch.float32 if full_precision else compute_dtype(),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": "cpu" if shards_weights() else device()},
            quantization_config=loading_config(quantization, getattr(torch, choices().four_bit_dtype))
            if quantization
            else None,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a library makes of values that mean nothing to it
        if ran_out(error):
            raise
        raise does_not_load(folder, error) from error
    _refuse_made_up(folder, type(model).__name__, told["missing_keys"], told["unexpected_keys"])
    if quantization:
        prepare_for_training(model, quantization)
    model.requires_grad_(False)
    model.eval()
    return model


def _refuse_made_up(folder: Path, kind: str, missing: Collection[str], unknown: Collection[str]) -> None:
    """Refuse a model some of whose weights are in no file: transformers fills them with random numbers, and warns."""
    if missing:
        raise BadModel(
            f"lacks weights that {kind} has: they would be random numbers",
            where=str(folder),
            got=f"{len(missing)} weights in no file, and {len(unknown)} in the files that it has no place for",
            examples=[*sorted(missing)[:3], *(f"{name} (no place for it)" for name in sorted(unknown)[:2])],
            expected="every weight, by the name that this class gives it",
            fix="save the whole model again with save_pretrained of this class, or fetch the folder again",
        )
