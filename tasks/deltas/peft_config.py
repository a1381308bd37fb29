"""Settings of an adapter that its merge reads, with PEFT's own defaults, and how PEFT reads names in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from tasks.adapters.files import CONFIG, read_adapter_config
from tasks.core.errors import BadModel

T = TypeVar("T")

_LEAVES_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initial values of LoRA that leave the base's weights alone; others (PiSSA, OLoRA, LoftQ) take a part out of them."""

_NO_SUM = ("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config")
"""What a LoRA may be configured to that no weights added to the base's can stand for."""

LoraRank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


def _pattern(text: Any) -> Any:
    try:
        re.compile(text)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"is no pattern: {error}") from error
    return text


ModulePattern = Annotated[str, BeforeValidator(_pattern)]
Patterns = BeforeValidator(lambda value: {} if value is None else value)


class Settings(BaseModel):
    """The fields of adapter_config.json that say what an adapter does to weights."""

    peft_type: str
    r: LoraRank = 8
    lora_alpha: Alpha = 8
    rank_pattern: Annotated[dict[ModulePattern, LoraRank], Patterns] = {}
    alpha_pattern: Annotated[dict[ModulePattern, Alpha], Patterns] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_r: LoraRank = 12
    target_modules: ModulePattern | list[str] | None = None
    exclude_modules: ModulePattern | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def rank(self, module: str) -> int:
        """Return the rank of a module's update."""
        return own(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the scale of a module's update: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        alpha, rank = own(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return float(alpha / (rank**0.5 if self.use_rslora else rank))

    def targets(self, module: str) -> bool:
        """Return whether a module is to be changed, as PEFT's `check_target_module_exists` has it."""
        wanted, layers = self.target_modules, self.layers_to_transform
        if not _named(module, wanted) or _named(module, self.exclude_modules):
            return False
        if layers in (None, []) or isinstance(wanted, str):
            return True
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in ([layers] if isinstance(layers, int) else layers or [])


def settings_of(adapter: Path) -> Settings:
    """Read the configuration of a published adapter that is to be merged.

    Raises:
        BadModel: there is none, it is unsafe, has invalid values, or asks for what is no sum of weights.
    """
    config = read_adapter_config(adapter)
    try:
        settings = Settings.model_validate(config)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))} = {each['input']}: {each['msg']}" for each in error.errors()]
        raise BadModel("has values that mean nothing", where=str(adapter / CONFIG), examples=wrong) from error
    wrong = [f"{key}: {config[key]}" for key in _NO_SUM if config.get(key)]
    if settings.peft_type == "LORA" and config.get("init_lora_weights") not in _LEAVES_BASE:
        wrong.append(f"init_lora_weights: {config['init_lora_weights']}: a part of the base was moved into the adapter")
    if wrong:
        raise BadModel(
            "cannot be merged",
            where=str(adapter / CONFIG),
            examples=wrong,
            fix="convert it to plain LoRA (`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)",
        )
    return settings


def own(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """Return a module's value: that of the first pattern its name ends with, as PEFT has it, or of all others."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, otherwise)


def _named(module: str, wanted: str | list[str] | None) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in wanted or ())
