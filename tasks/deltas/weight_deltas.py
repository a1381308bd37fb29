"""Changes that a published adapter makes to the weights of its base: for each weight's name, what takes its place.

Nothing is computed here: a change is a function from a weight to the source (`lazy_tensors`) that is written instead.
Names are those of the base's files. What the adapter says and what the base has are held against each other first:
every tensor of the adapter has a place, and every place that its configuration names has tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tasks.adapters.files import CONFIG, WEIGHTS, weights_file
from tasks.adapters.patterns import check_patterns
from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel
from tasks.deltas.expert_deltas import Fused, fused_weights
from tasks.deltas.lazy_tensors import Added, Change, Factor, Normed, Plus, Rows, Scaled, Stacked
from tasks.deltas.peft_config import Settings, settings_of
from tasks.models.safetensors_reader import BYTES, StoredTensor, TensorSource, blocks, read_header, stored_in

_ROUNDING = 1e-5
"""PEFT adds it to the rank that AdaLoRA's updates are divided by."""

_PREFIX = "base_model.model."

_CONV1D = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer"}
_CONV1D_MODULES = {"c_attn", "q_attn", "c_proj", "c_fc"}
"""Families with linear layers that hold (in, out), and those layers. PEFT tells them by their class, whatever
`fan_in_fan_out` says."""

_HEADS = {
    "embed_tokens.weight": "lm_head.weight",
    "wte.weight": "lm_head.weight",
    "word_embeddings.weight": "lm_head.weight",
    "embed_in.weight": "embed_out.weight",
}
"""What the embedding's weight is called in files, and the head's of the same model."""

FoundDelta: TypeAlias = "tuple[str | None, Change, tuple[str, ...]]"
"""A weight of the base, or None where it has none; what becomes of it; and the adapter's tensors that say so."""


def changes_of(adapter: Path, base: Mapping[str, StoredTensor], family: str = "") -> dict[str, Change]:
    """Build the changes that an adapter, or the whole model in its folder, makes to each weight of a base.

    Args:
        adapter: a published adapter, or a folder of weights that were trained whole.
        base: the base's tensors by name.
        family: its model_type; it identifies weights that are transposed.

    Raises:
        BadModel: the adapter is torn, not finite, of a method that does not change weights, at odds with its own
            configuration, or does not fit the base.
    """
    if not (adapter / CONFIG).is_file():
        return _whole(adapter, base)
    settings = settings_of(adapter)
    kind = settings.peft_type
    if kind not in METHODS:
        raise BadModel(
            "is of a method that cannot be merged", where=str(adapter / CONFIG), got=kind, expected=", ".join(METHODS)
        )
    tensors = adapter_tensors(adapter)
    check_patterns(settings.model_dump(), _names(settings, tensors, base), str(adapter / CONFIG))
    check_finite(tensors, adapter / WEIGHTS)
    return _collected(_Adapter(adapter, settings, tensors, base, family), METHODS[kind])


def _names(settings: Settings, tensors: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor]) -> set[str]:
    """Return the names that a configuration's patterns are matched to: modules of the adapter and of the base."""
    modules = {re.sub(r"\.(lora_|ia3_l).*", "", name) for name in tensors} | {n.removesuffix(".weight") for n in base}
    parameters = {parameter.rpartition(".")[2] for parameter in settings.target_parameters or ()}
    return modules | {f"{module}.{parameter}" for module in modules for parameter in parameters}


def adapter_tensors(adapter: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a published adapter, by the names of the modules that they belong to.

    Raises:
        BadModel: there are none, they are pickled, or the file is torn.
    """
    return {name.removeprefix(_PREFIX): tensor for name, tensor in read_header(weights_file(adapter)).items()}


def check_finite(tensors: Mapping[str, StoredTensor], where: Path) -> None:
    """Refuse tensors with a number that is not finite.

    Raises:
        BadModel: a tensor has one.
    """
    import numpy as np

    def count(tensor: StoredTensor) -> int:
        return sum(int((~np.isfinite(tensor.floats(*block))).sum()) for block in blocks(tensor.shape))

    broken = {name: count(tensor) for name, tensor in tensors.items() if tensor.dtype in BYTES}
    if any(broken.values()):
        raise BadModel(
            f"has {sum(broken.values())} values that are not finite; refused",
            where=str(where),
            examples=[f"{name}: {number}" for name, number in broken.items() if number],
        )


def embedding_and_head(names: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the embedding's and the head's weight; empty where the embedding has no usual name."""
    for ending, head in _HEADS.items():
        if found := next((name for name in names if f".{name}".endswith(f".{ending}")), None):
            return found, head
    return "", ""


def name_in(base: Mapping[str, Any], name: str) -> str | None:
    """Find a model weight's name in its base's files, which may lack the part before the first dot."""
    return next((each for each in (name, name.partition(".")[2]) if each in base), None)


class _Adapter(NamedTuple):
    """An adapter, and the base that it is held against."""

    folder: Path
    settings: Settings
    tensors: Mapping[str, StoredTensor]
    base: Mapping[str, StoredTensor]
    family: str

    def weight(self, module: str, suffix: str = ".weight") -> str | None:
        """Find the name in the base of a module's weight."""
        return name_in(self.base, f"{module}{suffix}")

    def turned(self, module: str) -> bool:
        """Return whether a module's weight is (in, out)."""
        return self.family in _CONV1D and module.rpartition(".")[2] in _CONV1D_MODULES

    def unfit(self, *examples: str) -> BadModel:
        """Build the error for an adapter and a base that do not fit each other."""
        fix = "use the base that it was trained on"
        return BadModel("does not fit this base", where=str(self.folder), examples=examples, fix=fix)

    def check_shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors of other shapes than a weight needs, or that are missing.

        Raises:
            BadModel: one is.
        """
        got = {name: self.tensors[name].shape if name in self.tensors else "missing" for name in wanted}
        if wrong := [name for name in wanted if got[name] != wanted[name]]:
            raise self.unfit(*(f"{name}: shape {got[name]}, expected {wanted[name]}" for name in wrong))

    def matrix(self, weight: str | None, turned: bool) -> tuple[int, int] | None:
        """Return the outputs and inputs of a weight; None for one that the base does not have.

        Raises:
            BadModel: it is no matrix.
        """
        if weight is None:
            return None
        shape = self.base[weight].shape
        if len(shape) != 2:
            raise BadModel("changes what is no matrix", where=str(self.folder), examples=[f"{weight}: shape {shape}"])
        return (shape[1], shape[0]) if turned else (shape[0], shape[1])


DeltaReader: TypeAlias = "Callable[[_Adapter, Mapping[str, StoredTensor]], Iterator[FoundDelta]]"
"""What of an adapter's tensors that are left does what to the base."""


# --- the frame of all methods -----------------------------------------------------------------------------------------


def _collected(adapter: _Adapter, of_method: DeltaReader) -> dict[str, Change]:
    """Collect all changes of an adapter; its tensors and the places that it names must be all there."""
    changes: dict[str, Change] = {}
    wrong: list[str] = []
    left = dict(adapter.tensors)
    for finding in (_weights, of_method):  # whole weights first: updates are added to these
        for weight, change, told in list(finding(adapter, left)):
            for name in told:
                left.pop(name, None)
            if weight is None:
                wrong += [f"{name}: the base has no such weight" for name in told]
            else:
                changes[weight] = _after(changes[weight], change) if weight in changes else change
    wrong += [f"{name}: not a part of {adapter.settings.peft_type}" for name in left]
    missing = sorted(_expected(adapter) - changes.keys())
    if wrong or missing or not changes:
        parts = len(adapter.tensors)
        raise BadModel(
            f"{parts - len(wrong)} of {parts} adapter tensors match this base model"
            + (f", and {len(missing)} weights that it should change have none" if missing else ""),
            where=str(adapter.folder),
            examples=[*wrong, *(f"{name}: missing in the adapter" for name in missing)],
            fix="use the base that the adapter was trained on",
        )
    return changes


def _expected(adapter: _Adapter) -> set[str]:
    """Return the weights that the configuration changes in the base; modules' names do not name single experts."""
    settings = adapter.settings
    if settings.layers_pattern or settings.target_modules == "all-linear":
        return fused_weights(adapter.base, settings)
    matrices = (name for name, tensor in adapter.base.items() if name.endswith(".weight") and len(tensor.shape) == 2)
    wanted = {name for name in matrices if settings.targets(name.removesuffix(".weight")) and ".experts." not in name}
    return wanted | fused_weights(adapter.base, settings)


def _weights(adapter: _Adapter, left: Mapping[str, StoredTensor]) -> Iterator[FoundDelta]:
    """Yield tensors that replace one of the base's: an embedding, a bias, a module that was trained."""
    for name in left:
        if not re.search(r"\.lora_|\.ia3_l$|trainable_tokens_delta$", name):
            weight = name_in(adapter.base, re.sub(r"\.(token_adapter|base_layer|modules_to_save)\b", "", name))
            yield weight, _instead(adapter, name, weight), (name,)


def _instead(adapter: _Adapter, name: str, weight: str | None) -> Change:
    """Build the change by a tensor that replaces a weight, or by rows of added tokens that follow the base's."""
    trained = adapter.tensors[name]
    shape = adapter.base[weight].shape if weight else trained.shape
    if trained.shape == shape:
        return _become(trained)
    grows = weight in embedding_and_head(adapter.base) and len(trained.shape) == 2 and trained.shape[1] == shape[1]
    added = added_tokens(adapter.folder)
    if grows and trained.shape[0] > shape[0]:
        return _become(trained)
    if grows and added and sorted(added) == list(range(shape[0], shape[0] + trained.shape[0])):
        return lambda base: Stacked((base, trained))
    raise adapter.unfit(f"{name}: shape {trained.shape}, the base has {shape}, added_tokens.json adds {len(added)}")


def added_tokens(folder: Path) -> list[int]:
    """Return the ids of the tokens that were added to the tokenizer of a folder."""
    path = folder / "added_tokens.json"
    return [int(number) for number in read_object(path).values()] if path.is_file() else []


def _whole(folder: Path, base: Mapping[str, StoredTensor]) -> dict[str, Change]:
    """Build the changes of weights that were trained whole: all of the base's, in its shapes; a tied head may lack."""
    trained = stored_in(folder)
    check_finite(trained, folder)
    _, head = embedding_and_head(base)
    wrong = [f"{name}: the base has no such weight" for name in trained.keys() - base.keys()]
    wrong += [f"{name}: missing" for name in base.keys() - trained.keys() - {head}]
    wrong += [
        f"{name}: shape {trained[name].shape}, the base has {base[name].shape}"
        for name in trained.keys() & base.keys()
        if trained[name].shape != base[name].shape
    ]
    if wrong:
        raise BadModel("are not the weights of this base", where=str(folder), examples=sorted(wrong))
    return {name: _become(weight) for name, weight in trained.items()}


# --- LoRA and its kin -------------------------------------------------------------------------------------------------


def _lora(adapter: _Adapter, left: Mapping[str, StoredTensor]) -> Iterator[FoundDelta]:
    """W + s B A; with the norms that DoRA trained."""
    for name in left:
        if found := re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name):
            module, embedding, ending = found[1], found[2] or "", found[3] or ""
            b, bias = f"{module}.lora_{embedding}B{ending}", f"{module}.lora_B.bias"
            plain = module.replace(".base_layer", "")
            if adapter.weight(plain) is None and adapter.settings.target_parameters and b in left:
                fused = Fused(_place(adapter, plain), left[name], left[b], adapter.family)
                for weight, source in fused.changes(adapter.base, adapter.settings):
                    yield weight, _be(source), (name, b)
                continue
            yield _low_rank(adapter, module, name, b, turned=bool(embedding) or adapter.turned(module))
            if bias in left:
                yield adapter.weight(module, ".bias"), _plus(left[bias], adapter.settings.scale(module)), (bias,)
        elif name.endswith("trainable_tokens_delta"):
            yield from _trained_rows(adapter, name)


def _place(adapter: _Adapter, module: str) -> str:
    """Return a module's name as files have it, which may lack the part before the first dot."""
    short = module.partition(".")[2]
    return short if any(name.startswith(f"{short}.") for name in adapter.base) else module


def _low_rank(adapter: _Adapter, module: str, a: str, b: str, *, turned: bool) -> FoundDelta:
    """Build one module's update, after checking its shapes by the weight's and its rank by the configuration's."""
    weight, settings = adapter.weight(module), adapter.settings
    first = adapter.tensors[a]
    rank, scale = settings.rank(module), settings.scale(module)
    if not first.shape or first.shape[0] != rank:
        raise BadModel(
            f"adapter_config says r = {rank}, but tensors have r = {first.shape[0] if first.shape else 0}",
            where=str(adapter.folder),
            examples=[a],
        )
    trained = (f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight")
    norms = next((name for name in trained if name in adapter.tensors), "")
    if settings.use_dora != bool(norms):
        raise adapter.unfit(f"{trained[0]}: {'there' if norms else 'missing'}, and use_dora is {settings.use_dora}")
    if shape := adapter.matrix(weight, turned):
        adapter.check_shapes({a: (rank, shape[1]), b: (shape[0], rank)})
        if norms and math.prod(adapter.tensors[norms].shape) != shape[0]:
            raise adapter.unfit(f"{norms}: shape {adapter.tensors[norms].shape} for a weight of {shape}")
    elif b not in adapter.tensors:
        raise adapter.unfit(f"{b}: missing")
    second, magnitudes = adapter.tensors[b], adapter.tensors.get(norms)

    def change(base: TensorSource) -> TensorSource:
        if turned:
            total: TensorSource = Added(base, Factor(first, turned=True), Factor(second, turned=True, scale=scale))
        else:
            total = Added(base, Factor(second, scale=scale), Factor(first))
        return total if magnitudes is None else Normed(total, magnitudes, turned)

    return weight, change, (a, b, *([norms] if norms else []))


def _trained_rows(adapter: _Adapter, name: str) -> Iterator[FoundDelta]:
    """Single tokens that were trained; PEFT learns them for a head that is the embedding, too."""
    trained = adapter.tensors[name]
    module = re.sub(r"(\.token_adapter)?\.trainable_tokens_delta$", "", name)
    chosen = adapter.settings.trainable_token_indices or []
    if isinstance(chosen, Mapping):
        chosen = next((ids for key, ids in chosen.items() if module.endswith(key)), [])
    weight = adapter.weight(module)
    tokens = adapter.base[weight].shape[0] if weight else 0
    saved = adapter.tensors.get(f"{module}.token_adapter.base_layer.weight", adapter.tensors.get(f"{module}.weight"))
    tokens = max(tokens, saved.shape[0] if saved else 0)
    if len(chosen) != trained.shape[0] or not all(0 <= token < tokens for token in chosen):
        raise adapter.unfit(f"{name}: {trained.shape[0]} rows, trainable_token_indices {chosen[:8]} of {tokens} tokens")

    def rows(base: TensorSource) -> TensorSource:
        return Rows(base, tuple(chosen), trained)

    yield weight, rows, (name,)
    for other in adapter.base:  # a head that is the embedding
        if weight and other != weight and adapter.base[other] == adapter.base[weight]:
            yield other, rows, (name,)


def _adalora(adapter: _Adapter, left: Mapping[str, StoredTensor]) -> Iterator[FoundDelta]:
    """W + s P L Q, where s is alpha / the rank in the beginning, and L a diagonal."""
    scale = adapter.settings.lora_alpha / (adapter.settings.init_r + _ROUNDING)
    for a in [name for name in left if name.endswith(".lora_A")]:
        module = a.removesuffix(".lora_A")
        weight, turned = adapter.weight(module), adapter.turned(module)
        e, b, rank = f"{module}.lora_E", f"{module}.lora_B", left[a].shape[0]
        shape = adapter.matrix(weight, turned) or (left[b].shape[0] if b in left else 0, left[a].shape[-1])
        adapter.check_shapes({a: (rank, shape[1]), e: (rank, 1), b: (shape[0], rank)})
        outer, inner = Factor(left[b], turned=turned, scale=scale), Factor(left[a], turned=turned, by_row=left[e])
        yield weight, _add(*((inner, outer) if turned else (outer, inner))), (a, e, b)


def _ia3(adapter: _Adapter, left: Mapping[str, StoredTensor]) -> Iterator[FoundDelta]:
    """W with its rows scaled, for outputs, (out, 1), or its columns, for inputs, (1, in); biases with the outputs."""
    for name in [name for name in left if name.endswith(".ia3_l")]:
        module, factors = name.removesuffix(".ia3_l"), left[name]
        weight, turned = adapter.weight(module), adapter.turned(module)
        shape = adapter.matrix(weight, turned)
        of_outputs = len(factors.shape) == 2 and factors.shape[1] == 1
        if shape:
            adapter.check_shapes({name: (shape[0], 1) if of_outputs else (1, shape[1])})
        yield weight, _scaled(factors, of_outputs != turned), (name,)
        if of_outputs and (bias := adapter.weight(module, ".bias")):
            yield bias, _scaled(factors, by_row=True), (name,)


METHODS: dict[str, DeltaReader] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
}
"""The methods of PEFT that change weights, and so can be merged."""


def _become(weight: StoredTensor) -> Change:
    return lambda base: weight


def _be(source: TensorSource) -> Change:
    return lambda base: source


def _add(left: Factor, right: Factor) -> Change:
    return lambda base: Added(base, left, right)


def _plus(more: StoredTensor, scale: float) -> Change:
    return lambda base: Plus(base, more, scale)


def _scaled(factors: StoredTensor, by_row: bool) -> Change:
    return lambda base: Scaled(base, factors, by_row)


def _after(first: Change, second: Change) -> Change:
    return lambda base: second(first(base))
