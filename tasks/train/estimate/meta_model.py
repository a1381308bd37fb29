"""Models without weights: made from a config alone, to count their parameters and to rehearse their training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.attach import make_trainable
from tasks.adapters.params import AnyAdapter, FullAdapter, Int8Adapter, PeftAdapter, QloraAdapter
from tasks.core.errors import BadModel
from tasks.models.loader import Model
from tasks.models.quantization import loading_config
from tasks.tokenization.architecture import outline_of
from tasks.tokenization.model_config import refuse_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, OSError, ArithmeticError)
"""What transformers raises for a config that it cannot make a model of."""


class Parameters(NamedTuple):
    """Parameter counts of a model, whatever its numbers are stored in: all, and those that are trained."""

    trained: int
    all: int


def read_model_config(path: Path) -> PreTrainedConfig:
    """Read the configuration of a model.

    Args:
        path: a model folder, or a config.json by whatever name.

    Raises:
        BadModel: there is none, it is damaged, needs to run its own code, is of an unknown architecture, or has no
            layers.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from tasks.tokenization.baichuan import make_known

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
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:  # of some families no config says it
        raise BadModel("has no layers", where=str(file), got="num_hidden_layers below 1", expected="1 or more")
    if published.get("tie_word_embeddings") is False and config.tie_word_embeddings:
        config.head_of_its_own = True
    return config


def meta_model(config: PreTrainedConfig, adapter: AnyAdapter | None, dtype: torch.dtype, steps: int = 1) -> Model:
    """Build a model of that shape on the meta device, as training would load it, with a new adapter.

    Args:
        config: the model's configuration.
        adapter: what is put on it; without one, every parameter is trainable.
        dtype: what the weights are loaded in; all of them are trained in float32.
        steps: optimizer steps of the training.

    Raises:
        BadModel: the config has no model that writes text, contradicts itself, or the adapter does not fit it or needs
            its weights.
    """
    import torch

    dtype = torch.float32 if isinstance(adapter, FullAdapter) else dtype
    try:
        with torch.device("meta"):
            model = outline_of(deepcopy(config), dtype=dtype)
    except UNUSABLE as error:
        raise BadModel(
            "no model can be made of this config", where=config.model_type, got=str(error).split("\n")[0]
        ) from error
    if "head_of_its_own" in vars(config):  # T5's kind: transformers ties such until it sees weights that differ
        model.set_output_embeddings(deepcopy(model.get_output_embeddings()))
    if adapter is None:
        return model
    if isinstance(adapter, QloraAdapter | Int8Adapter):
        _quantize(model, adapter, dtype)
    model.requires_grad_(False)
    try:
        with torch.device("meta"):
            return make_trainable(model, adapter, steps)
    except RuntimeError as error:  # NotImplementedError too
        raise BadModel(
            "this adapter cannot be made without weights", where=_named(adapter), got=str(error).split("\n")[0]
        ) from error


def _named(adapter: AnyAdapter) -> str:
    return f"adapter.method {adapter.method}" if isinstance(adapter, PeftAdapter) else adapter.name


def _quantize(model: PreTrainedModel, adapter: QloraAdapter | Int8Adapter, dtype: torch.dtype) -> None:
    """Put 4-bit or 8-bit layers in place of those that transformers would quantize when it loads the model."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(loading_config(adapter.base_quantization, dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    loaded: Any = model  # as after loading; by this PEFT chooses its layers
    loaded.is_loaded_in_4bit, loaded.is_loaded_in_8bit = adapter.name == "qlora", adapter.name == "lora8bit"


def count(model: nn.Module) -> Parameters:
    """Count the parameters of a model on the meta device; a quantized weight counts its numbers, not its bytes."""
    parameters = list(model.parameters())
    return Parameters(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def to_fake_tensors(model: nn.Module, device: torch.device) -> None:
    """Let the tensors of a model on the meta device pass for tensors on another.

    On the meta device itself PyTorch chooses other kernels, of attention above all, than training will. 4-bit weights
    are packed, with constants for their blocks; 8-bit ones get a constant for each row, and no input of theirs has
    outliers: which would, only numbers could say.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import PeftModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given: dict[Tensor, nn.Parameter] = {}  # tied weights stay one

    def pass_for(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)

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
            elif isinstance(module, Linear8bitLt) and name == "weight":
                packed = pass_for(weight, torch.int8)
                given[weight] = torch.nn.Parameter(packed, requires_grad=False)
                given[weight].CB = packed  # type: ignore[attr-defined]
                given[weight].SCB = pass_for(weight[:, 0].contiguous(), torch.float32)  # type: ignore[attr-defined]
                module.state.threshold = 0.0
            elif weight not in given:
                given[weight] = torch.nn.Parameter(pass_for(weight), weight.requires_grad)
            module._parameters[name] = given[weight]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = pass_for(buffer)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        tokens: dict[str, Tensor] = model.prompt_tokens  # no buffers
        tokens.update({name: pass_for(numbers) for name, numbers in tokens.items()})


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that a model holds: parameters, buffers, and the constants of quantized weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if (scales := vars(parameter).get("SCB")) is not None:
            yield scales
        state = vars(parameter).get("quant_state")
        while state is not None:
            yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
            state = state.state2
