"""Bottleneck adapters as a method of PEFT: small networks with a residual connection inside the layers of a model.

    houlsby    s + A(s) for what attention and the MLP give before it joins the residual stream (arXiv:1902.00751)
    pfeiffer   h + A(h) for what a layer gives as a whole (arXiv:2005.00052)
    parallel   s + scaling * A(x) for what the MLP gives, x being the residual stream before it (arXiv:2110.04366)

with A(x) = U f(D x + d) + u. The forms and initial values are those of the AdapterHub library for models that normalise
before each sublayer. U and u begin at zero for `houlsby` and `pfeiffer` here, so that a fresh adapter changes nothing.
Importing this module makes the method known to PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tasks.adapters.hooks import (
    HookedLayer,
    HookedTuner,
    chosen_layers,
    component_of,
    has,
    hidden_size_of,
    layers_of,
    peft_type,
    register_with_peft,
)
from tasks.adapters.pass_state import PassState
from tasks.models.device import without_autocast

BOTTLENECK_FORMS = {
    "houlsby": ("attention_output", "mlp_output"),
    "pfeiffer": ("block_output",),
    "parallel": ("mlp_output",),
}
"""The components of a layer that each form changes."""

_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "layer.1.layer_norm")
"""What the norm is called that stands before a layer's MLP, and so has the residual stream for its input.

Beside `pre_feedforward_layernorm` (Gemma 2) the second one normalises what attention gives; so it does in layers that
normalise after their sublayers alone (OLMo 2), which have a `post_feedforward_layernorm`.
"""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """Form and width of a bottleneck adapter.

    Raises:
        ValueError: a field has no such value.
    """

    form: str = field(default="houlsby", metadata={"help": "One of " + ", ".join(BOTTLENECK_FORMS)})
    reduction_factor: float = field(default=16.0, metadata={"help": "The hidden size divided by the bottleneck's"})
    non_linearity: str = field(default="relu", metadata={"help": "An activation: relu, silu, gelu, ..."})
    scaling: float = field(default=1.0, metadata={"help": "What A is multiplied by"})
    dropout: float = field(default=0.0, metadata={"help": "Share of the bottleneck that is zeroed in training"})
    layers: str | list[int] = field(default="all", metadata={"help": "Numbers of layers from 0, or all"})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Found from layers and form"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BOTTLENECK")
        for name, known in (("form", BOTTLENECK_FORMS), ("non_linearity", ACT2FN)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor: got {self.reduction_factor}, expected more than 0")


class Bottleneck(nn.Module):
    """A(x), scaled; float32 parameters, computed in the dtype of x or wider."""

    def __init__(self, hidden_size: int, config: BottleneckConfig) -> None:
        super().__init__()
        width = max(1, int(hidden_size // config.reduction_factor))
        self.down, self.up = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        if config.form == "parallel":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation: nn.Module = ACT2FN[config.non_linearity]
        self.dropout = nn.Dropout(config.dropout)
        self.scaling = config.scaling

    def forward(self, x: Tensor) -> Tensor:
        """Compute what is added, for x of shape (..., hidden)."""
        with without_autocast(x.device):
            wide = x.to(torch.promote_types(x.dtype, self.down.weight.dtype))
            added: Tensor = self.up(self.dropout(self.activation(self.down(wide)))) * self.scaling
            return added.to(x.dtype)


class _Pass(PassState):
    """Residual stream that a layer's bottlenecks read: from the norm before its MLP to the end of that."""

    read: Tensor | None = None


class BottleneckLayer(HookedLayer):
    """The bottlenecks on one module's output, by adapter."""

    adapter_layer_names = ("bottleneck_parts",)

    def __init__(self, module: nn.Module, norm: nn.Module | None) -> None:
        """`norm` is the module whose input the bottlenecks read; None for what they change itself."""
        super().__init__(module)
        self.bottleneck_parts = nn.ModuleDict()
        self._reads_norm = norm is not None
        self._pass = _Pass()
        if norm is not None:
            self._handles += [norm.register_forward_pre_hook(self._take), module.register_forward_hook(self._drop)]

    def changed(self, hidden: Tensor, adapter_name: str) -> Tensor:
        """Add what the bottleneck makes of its input."""
        read = self._pass.read if self._reads_norm else hidden
        added: Tensor = self.bottleneck_parts[adapter_name](read)
        return hidden + added

    def changed_at(self, hidden: Tensor, adapter_name: str, at: Tensor) -> Tensor:
        """Add it to some tokens alone."""
        read = self._pass.read if self._reads_norm else hidden
        own = hidden.index_select(-2, at)
        if read is None:
            raise AssertionError("the norm before the MLP has not run in this pass")
        return hidden.index_copy(-2, at, own + self.bottleneck_parts[adapter_name](read.index_select(-2, at)))

    def _take(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._pass.read = args[0]

    def _drop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pass.read = None


class BottleneckModel(HookedTuner):
    """A model with bottlenecks: `get_peft_model(base, BottleneckConfig(...))`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    child = "bottleneck"
    unmergeable = "a bottleneck is not linear, so no weights can say what it does"

    def _check_new_adapter_config(self, config: BottleneckConfig) -> None:
        super()._check_new_adapter_config(config)
        forms = {each.form == "parallel" for each in self.peft_config.values()}
        if len(forms) > 1:
            raise ValueError(
                "form: parallel adapters read another place than the others, so one model cannot have both"
            )

    def targets(self, config: BottleneckConfig) -> list[str]:
        """Return the names of the modules whose outputs are changed.

        Raises:
            ValueError: the model has no such layer, or no such module in it.
        """
        layers = chosen_layers(self.model, config.layers)
        return [
            component_of(layer, name, part) for name, layer in layers.items() for part in BOTTLENECK_FORMS[config.form]
        ]

    def new_layer(self, module: nn.Module, name: str, config: BottleneckConfig) -> BottleneckLayer:
        """Build a layer that reads the input of its form."""
        return BottleneckLayer(module, self._norm_before(name) if config.form == "parallel" else None)

    def new_part(self, layer: BottleneckLayer, adapter_name: str, config: BottleneckConfig) -> nn.Module:
        """Build a bottleneck."""
        return Bottleneck(hidden_size_of(self.model), config)

    def _norm_before(self, name: str) -> nn.Module:
        block, layer = next((k, v) for k, v in layers_of(self.model).items() if name.startswith(f"{k}."))
        norm = next((each for each in _NORMS if has(layer, each)), None)
        if norm is None or (norm != _NORMS[0] and has(layer, "post_feedforward_layernorm")):
            raise ValueError(f"form: {block} has no norm of a known name before its MLP, so parallel cannot be had")
        found: nn.Module = layer.get_submodule(norm)
        return found


peft_type("BOTTLENECK")
register_with_peft("bottleneck", BottleneckConfig, BottleneckModel)
