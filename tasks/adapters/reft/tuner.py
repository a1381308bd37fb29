"""Put edits into a model as PEFT puts any adapter: the method's configuration, its layers, its registration."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from tasks.adapters.hooks import (
    COMPONENTS,
    HookedLayer,
    HookedTuner,
    body_of,
    chosen_layers,
    component_of,
    hidden_size_of,
    layers_of,
    peft_type,
    register_with_peft,
)
from tasks.adapters.positions import LAYERS, Spans, parse_positions
from tasks.adapters.reft.interventions import INTERVENTIONS, Edit
from tasks.adapters.reft.prompt_positions import Places, Prompts, prompts_of, untouched
from tasks.core.errors import BadModel
from tasks.models.decoder import made_up_tokens, own_code


@dataclass
class ReftConfig(PeftConfig):  # type: ignore[misc]
    """Settings of ReFT: what is edited, where and how.

    Raises:
        ValueError: a field has no such value.
    """

    intervention: str = field(default="loreft", metadata={"help": "One of " + ", ".join(INTERVENTIONS)})
    r: int = field(default=4, metadata={"help": "Dimensions of the edited subspace"})
    layers: str | list[int] = field(
        default="all", metadata={"help": "Numbers of layers from 0, a range such as 4-7, or all"}
    )
    component: str = field(default="block_output", metadata={"help": "One of " + ", ".join(COMPONENTS)})
    positions: str = field(default="last", metadata={"help": "Of the prompt: last, all, fN, lN or fN+lM"})
    share_weights: bool = field(default=False, metadata={"help": "One edit a layer for first and last tokens"})
    dropout: float = field(default=0.0, metadata={"help": "Share of the edit that is zeroed in training"})
    source_bias: bool = field(default=True, metadata={"help": "Whether the learned map has a bias, the paper's b"})
    projection_bias: bool = field(default=True, metadata={"help": "Whether noreft's projection has a bias"})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Found from layers and component"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("REFT")
        parse_positions(self.positions)
        for name, known in (("intervention", INTERVENTIONS), ("component", COMPONENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.r < 1:
            raise ValueError(f"r: got {self.r}, expected at least 1")
        chosen = self.layers
        if not (re.fullmatch(LAYERS, chosen) if isinstance(chosen, str) else isinstance(chosen, list) and chosen):
            raise ValueError(f"layers: got {chosen!r}, expected all, a range such as 4-7, or a list of numbers")
        if not self.source_bias and not INTERVENTIONS[self.intervention].affine:
            raise ValueError(f"source_bias: {self.intervention} learns nothing else")


def check_states(model: Any) -> None:
    """Run a few tokens, and refuse a model whose layers do not give each token one hidden state, as some do.

    Raises:
        BadModel: their states have another shape than (rows, tokens, hidden).
    """
    base, wrong = model.get_base_model(), dict[str, str]()
    if any(p.is_meta for p in base.parameters()):
        return
    wanted = (1, 4, hidden_size_of(base))

    def look(name: str, output: Any) -> None:
        states = output[0] if isinstance(output, tuple | list) else output
        if tuple(states.shape) != wanted:
            wrong[name] = f"{name}: {tuple(states.shape)}"

    edited = {name: part for name, part in base.named_modules() if "reft" in part._modules}
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: look(name, output), prepend=True)
        for name, part in edited.items()
    ]
    try:
        with untouched(base), own_code(base):
            body_of(base)(input_ids=made_up_tokens(base, range(1, 5)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise BadModel(
            "the layers of this model do not give each token one hidden state that could be edited",
            where=f"{type(base).__name__}, adapter.component",
            examples=list(wrong.values()),
            expected=f"(1, 4, {wanted[2]}) for a row of 4 tokens",
            fix="train it with low-rank updates",
        )


class ReftLayer(HookedLayer):
    """The edits of one module's output, by adapter and span."""

    adapter_layer_names = ("reft_edits",)
    other_param_names = ("reft_spans",)

    def __init__(self, module: nn.Module, prompts: Prompts) -> None:
        super().__init__(module)
        self.reft_edits = nn.ModuleDict()
        self.reft_spans: dict[str, Spans] = {}
        self._prompts = prompts

    def changed(self, hidden: Tensor, adapter_name: str) -> Tensor:
        """Edit the tokens of the present prompts, and no others."""
        return self._edited(hidden, adapter_name, self._prompts.places(self.reft_spans[adapter_name], hidden.device))

    def changed_at(self, hidden: Tensor, adapter_name: str, at: Tensor) -> Tensor:
        """Edit the tokens of the adapter's own prompts, as they were given: `at` has those that are no prompt's too."""
        own = self._prompts.places(self.reft_spans[adapter_name], hidden.device, adapter_name)
        return self._edited(hidden, adapter_name, own)

    def _edited(self, hidden: Tensor, adapter_name: str, found: dict[str, Places]) -> Tensor:
        edits: Any = self.reft_edits[adapter_name]
        if found and "shared" in edits:
            rows, columns = zip(*found.values(), strict=True)
            found = {"shared": (torch.cat(rows), torch.cat(columns))}
        for span, at in found.items():
            hidden = hidden.index_put(at, edits[span](hidden[at]))
        return hidden


class ReftModel(HookedTuner):
    """A model with edits: `get_peft_model(base, ReftConfig(...))`."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    child = "reft"
    unmergeable = "ReFT edits prompt tokens alone, which no weights can say"

    def targets(self, config: ReftConfig) -> list[str]:
        """Return the names of the modules whose outputs are edited.

        Raises:
            ValueError: the model has no such layer or component, or fewer dimensions than the rank.
        """
        width = hidden_size_of(self.model)
        if config.r > width:
            raise ValueError(f"r: got {config.r}, expected at most the hidden size, {width}")
        layers = chosen_layers(self.model, config.layers)
        return [component_of(layer, name, config.component) for name, layer in layers.items()]

    def new_layer(self, module: nn.Module, name: str, config: ReftConfig) -> ReftLayer:
        """Build a layer that follows the model's prompts."""
        prompts = prompts_of(self.model)
        if prompts is None:
            prompts = self.model.reft_prompts = Prompts()
            prompts.follow(self.model, body_of(self.model))
        if config.component != "block_output":
            block = next(layer for layer in layers_of(self.model) if name.startswith(f"{layer}."))
            prompts.recall_within(self.model.get_submodule(block))
        return ReftLayer(module, prompts)

    def new_part(self, layer: ReftLayer, adapter_name: str, config: ReftConfig) -> nn.Module:
        """Build an edit for each span."""
        spans = layer.reft_spans[adapter_name] = parse_positions(config.positions)
        names = ("shared",) if config.share_weights and len(spans.names) > 1 else spans.names
        width = hidden_size_of(self.model)
        biases = {"bias": config.source_bias, "projection_bias": config.projection_bias}
        made = {name: Edit(config.intervention, width, config.r, dropout=config.dropout, **biases) for name in names}
        return nn.ModuleDict(made)

    def _unload_and_optionally_merge(self, merge: bool = True, **_: Any) -> nn.Module:
        prompts = prompts_of(self.model)
        model = super()._unload_and_optionally_merge(merge)
        if prompts:
            prompts.leave()
            del self.model.reft_prompts
        return model


peft_type("REFT")
register_with_peft("reft", ReftConfig, ReftModel)
