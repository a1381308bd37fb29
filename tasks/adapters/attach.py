"""Adapters on models: a fresh one to train, its published form on disk, and a model with a published one on it.

What the published form is, `tasks/adapters/files.py` says. Where all weights are trained there is no adapter: then it
is a model folder without a tokenizer, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.adapters.files import (
    CONFIG,
    UNKNOWN,
    WEIGHTS,
    Base,
    apart,
    check_base,
    identify_base,
    read_adapter_config,
    read_weights,
    write_base,
)
from tasks.adapters.package import FOLDER, base_in
from tasks.adapters.params import (
    OTHERS,
    AdaloraAdapter,
    AnyAdapter,
    FullAdapter,
    Ia3Adapter,
    Int8Adapter,
    LowRank,
    PromptTuningAdapter,
    QloraAdapter,
    ReftAdapter,
)
from tasks.adapters.patterns import check_patterns
from tasks.adapters.peft_configs import peft_config
from tasks.core.artifacts import as_json, atomic_write
from tasks.core.errors import BadModel
from tasks.models.decoder import decoder_of
from tasks.models.loader import Model, load_model
from tasks.tokenization.architecture import architecture_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def is_mergeable(adapter: AnyAdapter) -> bool:
    """Return whether an adapter can be added to the weights; others are kept beside them."""
    return isinstance(adapter, FullAdapter | LowRank | AdaloraAdapter | Ia3Adapter)


def init_adapter(base: Path, adapter: AnyAdapter, steps: int = 1) -> Model:
    """Load the base model with a new, trainable adapter on it, or with trainable weights.

    Args:
        base: a model folder.
        adapter: of params.
        steps: optimizer steps of the training.

    Raises:
        BadModel: the adapter does not fit the model.
    """
    model = make_trainable(_base_for(base, adapter), adapter, steps)
    if isinstance(adapter, PromptTuningAdapter) and adapter.start == "text":
        from tasks.adapters.prompt_tuning import start_from_text
        from tasks.tokenization.chat_template import load_tokenizer

        start_from_text(model, load_tokenizer(base)(adapter.text, add_special_tokens=False)["input_ids"])
    return model


def make_trainable(model: PreTrainedModel, adapter: AnyAdapter, steps: int = 1) -> Model:
    """Put a new, trainable adapter on a frozen model, or make weights of it trainable.

    Raises:
        BadModel: the adapter does not fit the model.
    """
    if isinstance(adapter, FullAdapter):
        return _unfrozen(model, adapter)
    # not through PEFT's prepare_model_for_kbit_training: it turns norms and embeddings to float32, which the model that
    # is merged, evaluated and served does not have
    _check_rank(model, adapter)
    config = peft_config(adapter, steps, architecture_of(model).task_type)
    if getattr(config, "target_modules", None) == "all-linear":
        vars(config)["exclude_modules"] = _no_plain_layers(model, config)
    adapted = _adapted(model, config, "params")
    _check_names(adapted, adapter)
    _check_embeddings(adapted)
    if isinstance(adapter, AdaloraAdapter):
        from tasks.adapters.adalora import freeze_ranks

        freeze_ranks(adapted)
    if isinstance(adapter, LowRank) and isinstance(adapter.targets, dict):
        from tasks.adapters.fused_projections import keep_parts_apart

        keep_parts_apart(adapted, adapter.targets)
    if isinstance(adapter, LowRank):
        from tasks.adapters.lora_kernel import add_in_one_pass

        add_in_one_pass(adapted)
    if isinstance(adapter, ReftAdapter):
        from tasks.adapters.reft.tuner import check_states

        check_states(adapted)
    return adapted


def _no_plain_layers(model: PreTrainedModel, config: PeftConfig) -> list[str] | None:
    """Return the linear layers of a model that an update cannot be added to.

    Some do more than multiply, such as Llama 4's routers with two results: an update of their product would stand in
    for all that they do. Some weights are held by several modules, each of which would get an update of its own. Some
    are read by a kernel that passes over the module, which PEFT knows. And what sees images is not trained by text.
    """
    from torch import nn

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shared: set[int] = _shared_weights(model)
    reads: set[nn.Module] = set(linear.values())
    if not model.config.is_encoder_decoder and model.config.get_text_config() is not model.config:
        reads = set((decoder_of(model) or model).modules())
    return [
        name
        for name, module in linear.items()
        if module not in reads
        or id(module.weight) in shared
        or not _multiplies(module)
        or _is_passed_over(model, config, name)
    ] or None


def _multiplies(module: Any) -> bool:
    """Return whether a linear layer of a model's own kind gives nothing but a product, plus its bias."""
    import torch
    from torch import nn

    own = type(module).forward is not nn.Linear.forward and type(module).__module__.startswith("transformers.models.")
    if not own:
        return True
    given = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    with torch.no_grad():
        try:
            found = module(given)
        except Exception:  # whatever it needs besides: it is no plain layer
            return False
        product = nn.functional.linear(given, module.weight, module.bias)
    if not isinstance(found, torch.Tensor) or found.shape != product.shape:
        return False
    return found.is_meta or bool(torch.allclose(found, product, rtol=1e-2, atol=1e-2))


def _is_passed_over(model: PreTrainedModel, config: PeftConfig, name: str) -> bool:
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of weights that more than one module holds."""
    from collections import Counter

    held = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {weight for weight, count in held.items() if count > 1}


def load_adapted(base: Path, folder: Path, adapter: AnyAdapter) -> Model:
    """Load the model that was trained: the base in the form it was trained on, with a published adapter.

    Raises:
        BadModel: the adapter is damaged, unknown, does not fit this base, or would change nothing.
    """
    if isinstance(adapter, FullAdapter):
        return load_model(folder, full_precision=True)
    return attach(_base_for(base, adapter), folder)


_NO_ADAPTER = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, re.error)
"""What PEFT raises for a configuration that a model cannot take."""


class Adapter(NamedTuple):
    """A published adapter in memory."""

    config: PeftConfig
    state: dict[str, Tensor]
    where: Path


def attach(model: PreTrainedModel, folder: Path, *, any_base: bool = False) -> PeftModel:
    """Put a published adapter on a model, for inference.

    Args:
        model: a base model without an adapter.
        folder: the adapter's.
        any_base: whether a base that is not the one that the adapter names is accepted.

    Raises:
        BadModel: the adapter is damaged, unknown, of another base, does not fit this model, or would change nothing.
    """
    if not any_base:
        check_base(folder, base_identity(model))
    return add_adapter(model, read_adapter(folder))


def add_adapter(model: PreTrainedModel | PeftModel, adapter: Adapter, name: str = "default") -> PeftModel:
    """Put an adapter on a model under a name; a model that has adapters gets one more.

    Raises:
        BadModel: the adapter does not fit this model, or would change nothing.
    """
    from peft import set_peft_model_state_dict

    adapter.config.inference_mode = True  # what wrote a soft prompt while it was trained is not published
    adapted = _adapted(model, adapter.config, str(adapter.where), name)
    if adapter.config.peft_type == "ADALORA":
        from tasks.adapters.adalora import take_ranks

        take_ranks(adapted, name)
    state = _without_base(adapted, adapter.state)
    _check_places(published_state(adapted, name), state, adapter.where)
    set_peft_model_state_dict(adapted, state, adapter_name=name)
    _take_lost(adapted, state, name)
    return adapted.requires_grad_(False).eval()


def _take_lost(adapted: PeftModel, state: Mapping[str, Tensor], name: str) -> None:
    """Set what PEFT lost without a word: names that transformers would change in a file, it changes here as well."""
    import torch

    with torch.no_grad():
        for key, held in published_state(adapted, name).items():
            if not torch.equal(held, state[key].to(held)):
                held.copy_(state[key])


def base_identity(model: PreTrainedModel) -> Base:
    """Identify a model's base by the folder that it was loaded from."""
    return identify_base(Path(model.name_or_path)) if model.name_or_path else UNKNOWN


def load_packaged(folder: Path, base: Path | None = None, *, checked: bool = False) -> Model:
    """Load the model of a folder that `merge` wrote: with its adapter, when it holds one that could not be merged.

    Args:
        folder: a model folder.
        base: where the base of such an adapter is, if it is not where the folder says.
        checked: `base` is what `base_in` gave for this folder, so its weights are not hashed again.

    Raises:
        BadModel: the folder is unsafe or incomplete, or its base is not to be found.
    """
    model = load_model(base if base and checked else base_in(folder, base))
    # the folder itself says that they belong together
    return attach(model, folder / FOLDER, any_base=True) if (folder / FOLDER).is_dir() else model


def save_adapter(model: Model, folder: Path) -> None:
    """Write what was trained in its published form."""
    from peft import PeftModel
    from safetensors.torch import save_file

    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    save_file(apart(published_state(model)), folder / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    base = base_identity(model.get_base_model())
    of = {"base_model_name_or_path": base.name, "revision": base.revision}
    # PEFT holds target modules as a set, whose order differs from process to process
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    atomic_write(folder / CONFIG, as_json(ordered | of))
    write_base(folder, base)


def published_state(model: Model, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors that an adapter is published as; of ReFT the orthogonal matrices, not their parameters."""
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    # an embedding that is adapted would be saved along, whole
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def _base_for(base: Path, adapter: AnyAdapter) -> PreTrainedModel:
    quantization = adapter.base_quantization if isinstance(adapter, QloraAdapter | Int8Adapter) else None
    return load_model(base, quantization, full_precision=isinstance(adapter, FullAdapter))


def _check_rank(model: PreTrainedModel, adapter: AnyAdapter) -> None:
    """Refuse low-rank updates of more ranks than the model is wide: they would be no smaller than the weights.

    Raises:
        BadModel: a rank is above the hidden size.
    """
    if not isinstance(adapter, LowRank | AdaloraAdapter):
        return
    rank = max(adapter.rank.values()) if isinstance(adapter.rank, dict) else adapter.rank
    width = getattr(model.config.get_text_config(), "hidden_size", rank)
    if rank > width:
        raise BadModel(
            "the rank is above the hidden size", where="adapter.rank", got=str(rank), expected=f"at most {width}"
        )


def _check_names(adapted: PeftModel, adapter: AnyAdapter) -> None:
    """Refuse names and patterns that no module has: PEFT is content when one of them matches.

    Raises:
        BadModel: one matches nothing.
    """
    from peft.utils.other import get_pattern_key

    if not isinstance(adapter, LowRank | AdaloraAdapter | Ia3Adapter):
        return
    changed: list[str] = adapted.base_model.targeted_module_names
    wanted = [] if isinstance(adapter.targets, str) else list(adapter.targets)
    idle = [name for name in wanted if not any(f".{module}".endswith(f".{name}") for module in changed)]
    if isinstance(adapter, LowRank):
        patterns = [each for by in (adapter.rank, adapter.alpha) if isinstance(by, dict) for each in by]
        idle += [p for p in patterns if p != OTHERS and all(get_pattern_key([p], m) == m != p for m in changed)]
    if idle:
        raise BadModel(
            "no module that is changed has this name",
            where="adapter",
            got=", ".join(idle),
            expected=", ".join(sorted({module.rpartition(".")[2] for module in changed})),
        )


def _check_embeddings(adapted: PeftModel) -> None:
    """Refuse adapters on weights that more than one module holds, where they would change another model than merged.

    Raises:
        BadModel: the head of a model whose head is its embedding, or the embedding that encoder and decoder share.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapted.get_base_model().config
    head, embedding = adapted.get_output_embeddings(), adapted.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) and head is not embedding and config.tie_word_embeddings:
        raise BadModel(
            "the head of this model is its embedding, which an adapter on the head would leave behind",
            where="adapter.targets",
            fix="leave the head out, or train the weights themselves: `name: full`",
        )
    if isinstance(embedding, BaseTunerLayer) and config.is_encoder_decoder:
        raise BadModel(
            "encoder and decoder hold the embedding themselves, so that an adapter on it changes nothing",
            where="adapter.targets",
            fix="leave it out, or train the weights themselves: `name: full`",
        )
    shared = _shared_weights(adapted.get_base_model())
    twice = [
        name.removesuffix(".base_layer")
        for name, module in adapted.get_base_model().named_modules()
        if name.endswith(".base_layer") and id(module._parameters.get("weight")) in shared
        if not (embedding is not None and module in embedding.modules())
    ]
    if twice:
        raise BadModel(
            "more than one module holds these weights, and each would get an update of its own",
            where="adapter.targets",
            examples=twice,
            fix="leave them out, or train the weights themselves: `name: full`",
        )


def _unfrozen(model: PreTrainedModel, adapter: FullAdapter) -> PreTrainedModel:
    """Make the chosen modules' weights trainable."""
    chosen = adapter.modules
    names = [chosen] if isinstance(chosen, str) else chosen
    check_patterns({"modules": chosen}, _module_names(model), "adapter.modules")
    for name, module in model.named_modules():
        of_name = name.rpartition(".")[2] in names if isinstance(chosen, list) else re.fullmatch(chosen, name)
        if chosen == "all" or of_name:
            module.requires_grad_(True)
    idle = set(chosen) - {name.rpartition(".")[2] for name, _ in model.named_modules()} if names is chosen else set()
    if idle or not any(weight.requires_grad for weight in model.parameters()):
        raise BadModel("the model has no such modules", where="adapter.modules", got=", ".join(sorted(idle or names)))
    return model


def _adapted(model: PreTrainedModel | PeftModel, config: PeftConfig, where: str, name: str = "default") -> PeftModel:
    from peft import PeftModel, get_peft_model

    check_patterns(config.to_dict(), _module_names(model), where)
    if getattr(config, "alora_invocation_tokens", None):  # without PEFT's own wrapper its layers are the base's
        raise BadModel(
            "an activated LoRA begins at certain tokens, which only PEFT's own forward pass looks for",
            where=where,
            got="alora_invocation_tokens",
            expected="a LoRA that is active throughout",
            fix="leave alora_invocation_tokens out",
        )
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model
        adapted: PeftModel = get_peft_model(model, config, name)
    except _NO_ADAPTER as error:
        if isinstance(error, RuntimeError) and model.device.type == "meta":
            raise  # it wants weights, which a model that is only estimated does not have
        raise BadModel("the adapter does not fit this model", where=where, got=str(error)) from error
    if config.is_prompt_learning:
        from tasks.adapters.prompt_tuning import count_only_what_is_attended

        count_only_what_is_attended(adapted)
    return adapted


def _module_names(model: PreTrainedModel | PeftModel) -> list[str]:
    """Return the names that PEFT matches patterns to."""
    from peft import PeftModel

    return [name for name, _ in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules()]


def read_adapter(folder: Path) -> Adapter:
    """Read a published adapter, after checking that it is safe and whole.

    Raises:
        BadModel: the adapter is damaged or unknown.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    import tasks.adapters.bottleneck
    import tasks.adapters.reft.tuner  # noqa: F401  # both make their methods known to PEFT

    kind = str(read_adapter_config(folder).get("peft_type"))
    if kind not in {name.value for name in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise BadModel("is of an unknown kind", where=str(folder / CONFIG), got=kind, expected="a method of PEFT")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise BadModel("is not a readable adapter", where=str(folder / CONFIG), got=str(error)) from error
    config.base_model_name_or_path = None  # it has been checked; PEFT would tell of every base with another path
    return Adapter(config, read_weights(folder), folder)


def _without_base(adapted: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what is the base's own anyway: PEFT also saves the whole embedding that an adapter is on."""
    own = {name: weight for name, weight in adapted.state_dict().items() if ".base_layer." in name and name in state}
    return {name: t for name, t in state.items() if name not in own or not t.to(own[name]).equal(own[name])}


def _check_places(target: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse tensors without a place, and places without a tensor: PEFT itself loads such an adapter silently."""
    wrong = [f"{name}: the model has no such place" for name in state.keys() - target.keys()]
    wrong += [f"{name}: missing in the adapter" for name in target.keys() - state.keys()]
    wrong += [
        f"{name}: shape {tuple(state[name].shape)}, the model wants {tuple(target[name].shape)}"
        for name in state.keys() & target.keys()
        if state[name].shape != target[name].shape
    ]
    if wrong or not state:
        raise BadModel(
            f"{len(state.keys() & target.keys())} of {len(target)} adapter tensors match this base model",
            where=str(folder),
            examples=sorted(wrong),
            fix="use the base that the adapter was trained on",
        )
