"""The two kinds of language models, and what follows from which of them a model is.

A decoder goes on with what it is given; an encoder-decoder (T5, arXiv:1910.10683) reads an input and writes a target.
A model's own configuration says which it is; nothing else does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.tokenization.model_config import read_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


class Architecture(NamedTuple):
    """A kind of models.

    Attributes:
        name: what it is called in messages.
        task_type: what PEFT calls it.
        rows: the kind of rows that it learns to answer, and is evaluated on.
    """

    name: str
    task_type: str
    rows: str


DECODER = Architecture("decoder", "CAUSAL_LM", "chat")
ENCODER_DECODER = Architecture("encoder-decoder", "SEQ_2_SEQ_LM", "pair")


def positions_of(config: PreTrainedConfig) -> float:
    """Return how many tokens a model can take in; infinity for families that set no limit."""
    longest: float | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if longest is None else longest


def architecture_in(folder: Path) -> Architecture:
    """Read the architecture of a folder's model; a decoder where there is a tokenizer only.

    Raises:
        BadModel: its configuration cannot be read, or is of no known architecture.
    """
    if not (folder / "config.json").is_file():
        return DECODER
    return architecture_by(read_config(folder))


def architecture_of(model: PreTrainedModel | PeftModel) -> Architecture:
    """Return the architecture of a loaded model."""
    return architecture_by(model.config)


def architecture_by(config: PreTrainedConfig) -> Architecture:
    """Return the architecture of the model that a configuration describes."""
    return ENCODER_DECODER if config.is_encoder_decoder else DECODER


def loader_of(config: PreTrainedConfig) -> type[Any]:
    """Return the class of transformers that loads the model of a configuration with the head that writes text.

    Models that see images, too, are loaded whole, as their files are, and their text part is what is trained. The text
    part of some is known to the library by its own name alone.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    sees = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    writes = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if sees and (not writes or sees in (config.architectures or ())):
        return transformers.AutoModelForImageTextToText
    named = next(iter(config.architectures or ()), "")
    if not writes and named.endswith("ForCausalLM") and hasattr(transformers, named):
        own: type[Any] = getattr(transformers, named)
        return own
    return transformers.AutoModelForCausalLM


def outline_of(config: PreTrainedConfig, **more: Any) -> PreTrainedModel:
    """Build the model of a configuration with random numbers, or on the meta device with none."""
    kind = loader_of(config)
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    model: PreTrainedModel = build(config, **more)
    return model
