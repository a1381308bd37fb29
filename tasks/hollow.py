"""Models without weights: made from a config alone, to count their parameters and to rehearse their training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapted import trainable
from tasks.adapter_params import AnyAdapter, FullAdapter, Int8Adapter, PeftAdapter, QloraAdapter
from tasks.errors import BadModel
from tasks.models import Model, refuse_code
from tasks.quantized import quantization

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, OSError)
"""What transformers raises for a config that it cannot make a model of."""


class Parameters(NamedTuple):
    """How many numbers a model has, whatever they are stored in, and how many of them are trained."""

    trained: int
    all: int


def read_config(path: Path) -> PreTrainedConfig:
    """The shape of a model.

    Args:
        path: a model folder, or a config.json by whatever name.

    Raises:
        BadModel: there is none, it is damaged, wants to run its own code, or is of an unknown architecture.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from tasks.baichuan import make_known

    make_known()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise BadModel("there is no config.json", where=str(path), fix="name a model folder, or a config.json")
    refuse_code(file)
    published = json.loads(file.read_text(encoding="utf-8"))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)
    except (*UNUSABLE, StrictDataclassError) as error:
        raise BadModel(
            "is not the config of a known architecture", where=str(file), got=str(error).split("\n")[0]
        ) from error
    if published.get("tie_word_embeddings") is False and config.tie_word_embeddings:
        config.head_of_its_own = True
    return config


def hollow(config: PreTrainedConfig, adapter: AnyAdapter | None, dtype: torch.dtype, steps: int = 1) -> Model:
    """A model of that shape on the meta device, as training would load it, with a new adapter.

    Args:
        config: what the model is like.
        adapter: what is put on it; without one, every parameter is trainable.
        dtype: what the weights are loaded in; all of them are trained in float32.
        steps: how many the training takes.

    Raises:
        BadModel: the config has no model that writes text, contradicts itself, or the adapter does not fit it or needs
            its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if isinstance(adapter, Int8Adapter):
        raise BadModel("this adapter cannot be made without weights", where=adapter.name, fix="estimate qlora or lora")
    dtype = torch.float32 if isinstance(adapter, FullAdapter) else dtype
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except UNUSABLE as error:
        raise BadModel(
            "no model can be made of this config", where=config.model_type, got=str(error).split("\n")[0]
        ) from error
    if "head_of_its_own" in vars(config):  # T5's kind: transformers ties such until it sees weights that differ
        model.set_output_embeddings(deepcopy(model.get_output_embeddings()))
    if adapter is None:
        return model
    if isinstance(adapter, QloraAdapter):
        _quantize(model, adapter, dtype)
    model.requires_grad_(False)
    try:
        with torch.device("meta"):
            return trainable(model, adapter, steps)
    except RuntimeError as error:  # NotImplementedError too
        raise BadModel(
            "this adapter cannot be made without weights", where=_named(adapter), got=str(error).split("\n")[0]
        ) from error


def _named(adapter: AnyAdapter) -> str:
    return f"adapter.method {adapter.method}" if isinstance(adapter, PeftAdapter) else adapter.name


def _quantize(model: PreTrainedModel, adapter: QloraAdapter, dtype: torch.dtype) -> None:
    """Puts 4-bit layers in place of those that transformers would quantize when it loads the model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization(adapter, dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as after loading; by this PEFT chooses its layers


def count(model: nn.Module) -> Parameters:
    """The parameters of a model on the meta device; a 4-bit weight counts its numbers, not its bytes."""
    parameters = list(model.parameters())
    return Parameters(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def pretend(model: nn.Module, device: torch.device) -> None:
    """Lets the tensors of a model on the meta device pass for tensors on another.

    On the meta device itself PyTorch chooses other kernels, of attention above all, than training will. 4-bit weights
    are packed, with constants for their blocks.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given: dict[Tensor, nn.Parameter] = {}  # tied weights stay one

    def pass_for(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(module, Linear4bit) and name == "weight":
                kind: Any = weight  # says how it is to be packed
                packed, state = functional.quantize_4bit(
                    pass_for(weight),
                    blocksize=kind.blocksize,
                    compress_statistics=kind.compress_statistics,
                    quant_type=kind.quant_type,
                    quant_storage=kind.quant_storage,
                )
                given[weight] = torch.nn.Parameter(packed, requires_grad=False)
                given[weight].quant_state = state  # type: ignore[attr-defined]
            elif weight not in given:
                given[weight] = torch.nn.Parameter(pass_for(weight), weight.requires_grad)
            module._parameters[name] = given[weight]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = pass_for(buffer)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Everything that a model holds: parameters, buffers, and the constants of 4-bit weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = vars(parameter).get("quant_state")
        while state is not None:
            yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
            state = state.state2
