"""What a published adapter does to the weights of its base: for each weight's name, what takes its place.

Nothing is computed here: a change is a function from a weight to the source (tasks/sources.py) that is written instead.
Names are those of the base's files. What the adapter says and what the base has are held against each other first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tasks.adapter_files import CONFIG, WEIGHTS, read_config, weights_file
from tasks.errors import BadModel
from tasks.outputs import read_object
from tasks.shards import BYTES, Source, Stored, blocks, read_header, stored_in
from tasks.sources import Added, AddedExperts, Factor, Longer, Normed, Plus, Rows, Scaled

Change: TypeAlias = "Callable[[Source], Source]"
"""From a weight of the base to what takes its place."""

_ROUNDING = 1e-5
"""PEFT adds it to the rank that AdaLoRA's updates are divided by."""

_LEAVES_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initial values of LoRA that leave the base's weights alone; others (PiSSA, OLoRA, LoftQ) take a part out of them."""

_NO_SUM = ("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config")
"""What a LoRA may be configured to that no weights added to the base's can stand for."""

_PREFIX = "base_model.model."
_EXPERTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""The fused weights of experts as transformers holds them, and what their parts are called in files."""


def changes_of(adapter: Path, base: Mapping[str, Stored]) -> dict[str, Change]:
    """What the adapter in a folder, or the model that is there instead, does to each weight of a base.

    Args:
        adapter: a published adapter, or a folder of weights that were trained whole.
        base: the base's tensors by name.

    Raises:
        BadModel: the adapter is torn, not finite, of a method that does not change weights, at odds with its own
            configuration, or does not fit the base.
    """
    if not (adapter / CONFIG).is_file():
        trained = stored_in(adapter)
        _check_places({name: _become(weight) for name, weight in trained.items()}, base, len(trained), adapter)
        return {name: _become(weight) for name, weight in trained.items()}
    config = read_config(adapter)
    kind = str(config.get("peft_type"))
    if kind not in _CHANGES:
        raise BadModel(
            "is of a method that cannot be merged", where=str(adapter / CONFIG), got=kind, expected=", ".join(_CHANGES)
        )
    tensors = adapter_tensors(adapter)
    check_finite(tensors, adapter / WEIGHTS)
    return _CHANGES[kind](_Adapter(adapter, config, tensors, base))


def adapter_tensors(adapter: Path) -> dict[str, Stored]:
    """The tensors of a published adapter, by the names of the modules that they belong to.

    Raises:
        BadModel: there are none, they are pickled, or the file is torn.
    """
    return {name.removeprefix(_PREFIX): tensor for name, tensor in read_header(weights_file(adapter)).items()}


def check_finite(tensors: Mapping[str, Stored], where: Path) -> None:
    """Refuses tensors with a number that is not finite.

    Raises:
        BadModel: one has.
    """
    import numpy as np

    def count(tensor: Stored) -> int:
        return sum(int((~np.isfinite(tensor.floats(*block))).sum()) for block in blocks(tensor.shape))

    broken = {name: count(tensor) for name, tensor in tensors.items() if tensor.dtype in BYTES}
    if any(broken.values()):
        raise BadModel(
            f"has {sum(broken.values())} values that are not finite; refused",
            where=str(where),
            examples=[f"{name}: {number}" for name, number in broken.items() if number],
        )


class _Adapter(NamedTuple):
    """An adapter, and the base that it is held against."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    base: Mapping[str, Stored]

    def weight(self, module: str, suffix: str = ".weight") -> str | None:
        """The name in the base of a module's weight; files may lack the part before the first dot."""
        name = f"{module}{suffix}"
        return next((each for each in (name, name.partition(".")[2]) if each in self.base), None)

    def refuse(self, what: str, **told: Any) -> BadModel:
        """An error about the adapter."""
        return BadModel(what, where=str(self.folder), **told)


# --- LoRA and its kin -------------------------------------------------------------------------------------------------


def _lora(adapter: _Adapter) -> dict[str, Change]:
    """W + s B A, where s is alpha / rank, or alpha / sqrt(rank) of rank-stabilised LoRA (arXiv:2312.03732)."""
    _check_lora(adapter)
    changes: dict[str, Change] = {}
    wrong: list[str] = []
    left = dict(adapter.tensors)

    def add(name: str | None, change: Change, told: str) -> None:
        if name is None:
            wrong.append(f"{told}: the base has no such weight")
        else:
            changes[name] = _after(changes[name], change) if name in changes else change

    for name in [name for name in left if _is_weight(name)]:  # first: updates are added to these
        weight = adapter.weight(
            name.replace(".base_layer", "").removesuffix(".weight"), "" if name.endswith(".bias") else ".weight"
        )
        add(weight, _instead(adapter, name, weight), name)
        del left[name]
    for module, a, b in list(_pairs(left)):
        scale = _scale(adapter, module.replace(".base_layer", ""))
        if adapter.weight(module) is None and (fused := list(_experts(adapter, module, a, b, scale))):
            for weight, change in fused:
                add(weight, change, a)
        else:
            add(adapter.weight(module), _low_rank(adapter, module, a, b, scale), a)
        bias = f"{module}.lora_B.bias"
        if bias in left:
            add(adapter.weight(module, ".bias"), _plus(left[bias], scale), bias)
        for part in (a, b, bias, *_norms_of(module)):
            left.pop(part, None)
    for name in [name for name in left if name.endswith("trainable_tokens_delta")]:
        module = re.sub(r"(\.token_adapter)?\.trainable_tokens_delta$", "", name)
        weight, rows = adapter.weight(module), _learnt_rows(adapter, module, left.pop(name))
        add(weight, rows, name)
        for other in (each for each in adapter.base if weight and adapter.base[each] == adapter.base[weight]):
            if other != weight:  # a head that is the embedding: PEFT learns such rows for both
                changes[other] = rows
    wrong += [f"{name}: not a part of LoRA" for name in left]
    wrong += [f"{name}: missing in the adapter" for name in _expected(adapter) - changes.keys()]
    _check_places(changes, adapter.base, len(changes) + len(wrong), adapter.folder, wrong)
    return changes


def _check_lora(adapter: _Adapter) -> None:
    config = adapter.config
    wrong = [f"{key}: {config[key]}" for key in _NO_SUM if config.get(key)]
    if config.get("init_lora_weights") not in _LEAVES_BASE:
        wrong.append(f"init_lora_weights: {config['init_lora_weights']}: a part of the base was moved into the adapter")
    if wrong:
        raise adapter.refuse(
            "cannot be merged",
            examples=wrong,
            fix="convert it to plain LoRA (`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)",
        )
    alphas = [config.get("lora_alpha", 8), *config.get("alpha_pattern", {}).values()]
    if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
        raise adapter.refuse("lora_alpha is no finite number", got=", ".join(map(str, alphas)))


def _is_weight(name: str) -> bool:
    """Whether an adapter's tensor stands for one of the base's: an embedding, a bias, a module that was trained."""
    return not re.search(r"\.lora_|trainable_tokens_delta$", name)


def _pairs(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, str, str]]:
    """Module, and the names of A and B, of every update."""
    for name in tensors:
        if found := re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", name):
            yield found[1], name, f"{found[1]}.lora_{found[2] or ''}B{found[3] or ''}"


def _scale(adapter: _Adapter, module: str) -> float:
    config = adapter.config
    rank = _own_rank(adapter, module)
    alpha = _own(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _own(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value for a module: of the first pattern that its name ends with, as PEFT has it, or of all others."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, otherwise)


def _norms_of(module: str) -> tuple[str, str]:
    return f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight"


def _low_rank(adapter: _Adapter, module: str, a: str, b: str, scale: float) -> Change:
    """One module's update, after holding its shapes against the weight's and its rank against the configuration's."""
    embedding = ".lora_embedding_" in a
    turned = bool(adapter.config.get("fan_in_fan_out")) or embedding
    first, second = adapter.tensors[a], adapter.tensors.get(b)
    said = _own_rank(adapter, module)
    if said != first.shape[0]:
        raise adapter.refuse(f"adapter_config says r = {said}, but tensors have r = {first.shape[0]}", examples=[a])
    weight = adapter.weight(module)
    shape = adapter.base[weight].shape if weight else ()
    (rows, *others) = shape[::-1] if turned and shape else shape or (0,)
    wanted = {a: (first.shape[0], math.prod(others)), b: (rows, first.shape[0])}
    got = {name: (t.shape[0], math.prod(t.shape[1:])) if t else None for name, t in ((a, first), (b, second))}
    if second is None or (weight and got != wanted):
        examples = [
            f"{name}: shape {got[name] or 'missing'}, expected {wanted[name]}"
            for name in (a, b)
            if got[name] != wanted[name]
        ]
        raise adapter.refuse("does not fit this base", examples=examples, fix="use the base that it was trained on")
    norms = next((adapter.tensors[name] for name in _norms_of(module) if name in adapter.tensors), None)

    def change(base: Source) -> Source:
        if turned:
            total: Source = Added(base, Factor(first, turned=True), Factor(second, turned=True, scale=scale))
        else:
            total = Added(base, Factor(second, scale=scale), Factor(first))
        return total if norms is None else Normed(total, norms, turned)

    return change


def _experts(adapter: _Adapter, module: str, a: str, b: str, scale: float) -> Iterator[tuple[str, Change]]:
    """The updates of the weights of experts that transformers holds as one, and PEFT names by the module they are in.

    Which of the module's weights it is, their shapes tell. In files they may be one tensor, or one for each expert.
    """
    plain = module.replace(".base_layer", "")
    first, second = adapter.tensors[a], adapter.tensors[b]
    wanted, experts = (second.shape[0], first.shape[1]), first.shape[0] // _own_rank(adapter, plain)
    for target in adapter.config.get("target_parameters") or ():
        where, _, parameter = target.rpartition(".")
        if not f".{plain}".endswith(f".{where}"):
            continue
        whole = adapter.weight(f"{plain}.{parameter}", "")
        if whole is not None and sorted(adapter.base[whole].shape[-2:]) == sorted(wanted):
            turned = adapter.base[whole].shape[-2:] != wanted
            yield whole, lambda base: AddedExperts(base, first, second, experts, scale, turned)  # noqa: B023
        parts = _EXPERTS.get(parameter, ()) if whole is None else ()
        names = [[_expert_weight(adapter, plain, expert, part) for part in parts] for expert in range(experts)]
        shapes = [adapter.base[name].shape if name else (0, 0) for name in names[0]]
        if parts and (sum(shape[0] for shape in shapes), shapes[0][1]) == wanted:
            for expert, number in product(range(experts), range(len(parts))):
                change = _of_expert(first, second, experts, scale, expert, sum(shape[0] for shape in shapes[:number]))
                yield names[expert][number] or plain, change


def _own_rank(adapter: _Adapter, module: str) -> int:
    return int(_own(adapter.config.get("rank_pattern"), module, adapter.config.get("r", 8)))


def _expert_weight(adapter: _Adapter, module: str, expert: int, part: tuple[str, ...]) -> str | None:
    """The name of one expert's matrix in files, which may know the module by another name (Mixtral)."""
    modules = (module, module.replace(".mlp.", ".block_sparse_moe."))
    found = (adapter.weight(f"{each}.{expert}.{name}") for each in modules for name in part)
    return next((name for name in found if name), None)


def _of_expert(a: Stored, b: Stored, experts: int, scale: float, expert: int, rows_from: int) -> Change:
    return lambda base: AddedExperts(base, a, b, experts, scale, first=expert, rows_from=rows_from)


def _instead(adapter: _Adapter, name: str, weight: str | None) -> Change:
    """A tensor that takes a weight's place, or rows of added tokens that follow those of the base."""
    learnt = adapter.tensors[name]
    shape = adapter.base[weight].shape if weight else learnt.shape
    if learnt.shape == shape or (learnt.shape[1:] == shape[1:] and learnt.shape[0] > shape[0]):
        return _become(learnt)
    added = added_tokens(adapter.folder)
    if learnt.shape[1:] == shape[1:] and added and sorted(added) == list(range(shape[0], shape[0] + learnt.shape[0])):
        return lambda base: Longer(base, learnt)
    raise adapter.refuse(
        "does not fit this base",
        examples=[f"{name}: shape {learnt.shape}, the base has {shape}, added_tokens.json adds {len(added)}"],
        fix="use the base that it was trained on",
    )


def added_tokens(folder: Path) -> list[int]:
    """The ids of the tokens that the tokenizer of a folder was given beside its own."""
    path = folder / "added_tokens.json"
    return [int(number) for number in read_object(path).values()] if path.is_file() else []


def _learnt_rows(adapter: _Adapter, module: str, learnt: Stored) -> Change:
    chosen = adapter.config.get("trainable_token_indices") or []
    if isinstance(chosen, Mapping):
        chosen = next((ids for name, ids in chosen.items() if module.endswith(name)), [])
    if len(chosen) != learnt.shape[0]:
        raise adapter.refuse(
            "does not say which tokens it learnt", got=f"{len(chosen)} ids for {learnt.shape[0]} rows", where=module
        )
    return lambda base: Rows(base, tuple(chosen), learnt)


def _expected(adapter: _Adapter) -> set[str]:
    """The weights of the base that the configuration wants changed, as PEFT reads it; experts apart."""
    config, targets = adapter.config, adapter.config.get("target_modules") or ()
    skipped = config.get("exclude_modules") or ()
    layers = config.get("layers_to_transform")
    if config.get("layers_pattern") or targets == "all-linear":
        return set()

    def names(module: str, wanted: Any) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == each or module.endswith(f".{each}") for each in wanted)

    def chosen(module: str) -> bool:
        if not names(module, targets) or names(module, skipped) or ".experts." in module:
            return False
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        wanted = [layers] if isinstance(layers, int) else layers
        return not wanted or isinstance(targets, str) or (layer is not None and int(layer[1]) in wanted)

    weights = (name for name, tensor in adapter.base.items() if name.endswith(".weight") and len(tensor.shape) == 2)
    return {name for name in weights if chosen(name.removesuffix(".weight"))}


def _adalora(adapter: _Adapter) -> dict[str, Change]:
    """W + s P L Q, where s is alpha / the rank in the beginning, and L a diagonal."""
    config, tensors = adapter.config, adapter.tensors
    scale = config["lora_alpha"] / (config["init_r"] + _ROUNDING)
    changes: dict[str, Change] = {}
    wrong: list[str] = []
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        module = name.removesuffix(".lora_A")
        right, singular, left = (tensors[f"{module}.lora_{part}"] for part in "AEB")
        turned = bool(config.get("fan_in_fan_out"))
        if (weight := adapter.weight(module)) is None:
            wrong.append(f"{name}: the base has no such weight")
        else:
            changes[weight] = _rank_wise(right, singular, left, scale, turned)
    _check_places(changes, adapter.base, len(changes) + len(wrong), adapter.folder, wrong)
    return changes


def _rank_wise(right: Stored, singular: Stored, left: Stored, scale: float, turned: bool) -> Change:
    outer, inner = Factor(left, turned=turned, scale=scale), Factor(right, turned=turned, by_row=singular)
    return lambda base: Added(base, inner, outer) if turned else Added(base, outer, inner)


def _ia3(adapter: _Adapter) -> dict[str, Change]:
    """W with its rows scaled, for outputs, (out, 1), or its columns, for inputs, (1, in); biases with the outputs."""
    changes: dict[str, Change] = {}
    wrong: list[str] = []
    for name, factors in adapter.tensors.items():
        module = name.removesuffix(".ia3_l")
        of_outputs = factors.shape[1] == 1
        if (weight := adapter.weight(module)) is None:
            wrong.append(f"{name}: the base has no such weight")
            continue
        changes[weight] = _scaled(factors, of_outputs != bool(adapter.config.get("fan_in_fan_out")))
        if of_outputs and (bias := adapter.weight(module, ".bias")):
            changes[bias] = _scaled(factors, by_row=True)
    _check_places(changes, adapter.base, len(changes) + len(wrong), adapter.folder, wrong)
    return changes


_CHANGES: dict[str, Callable[[_Adapter], dict[str, Change]]] = {"LORA": _lora, "ADALORA": _adalora, "IA3": _ia3}


def _become(weight: Stored) -> Change:
    return lambda base: weight


def _plus(more: Stored, scale: float) -> Change:
    return lambda base: Plus(base, more, scale)


def _scaled(factors: Stored, by_row: bool) -> Change:
    return lambda base: Scaled(base, factors, by_row)


def _after(first: Change, second: Change) -> Change:
    return lambda base: second(first(base))


def _check_places(
    changes: Mapping[str, Any], base: Mapping[str, Stored], wanted: int, where: Path, wrong: list[str] | None = None
) -> None:
    """Refuses an adapter that changes nothing, or has parts without a place, or places without a part."""
    wrong = [*(wrong or ()), *(f"{name}: the base has no such weight" for name in changes.keys() - base.keys())]
    if wrong or not changes:
        fits = len(changes.keys() & base.keys())
        raise BadModel(
            f"{fits} of {wanted} of its changes match this base model",
            where=str(where),
            examples=sorted(wrong),
            fix="use the base that the adapter was trained on",
        )
