"""One base model in memory with several adapters: W0 + B1 A1 -> W0 + B2 A2 without loading anything again.

Adapters of one method lie beside each other and one is switched on. Between methods the layers of the one are taken
out of the base and those of the other put in, which leaves the base as it was. Several may be in use together, each
for tokens of its own. A merged adapter is part of the weights,
so that a pass costs what it costs without one. What the weights were is kept, since a sum in floating point is not
undone by a subtraction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from tasks.adapters.attach import Adapter, add_adapter, base_identity, read_adapter
from tasks.adapters.files import check_base
from tasks.adapters.method_layers import MethodLayers, children_of
from tasks.adapters.mixed_batch import prepare
from tasks.core.errors import BadModel, BadParams
from tasks.core.shared_lock import SharedLock
from tasks.inference.decoding import Together
from tasks.models.loader import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_BESIDE_EACH_OTHER = ("LORA", "IA3", "REFT", "BOTTLENECK")
"""Methods of which PEFT holds several adapters that know nothing of one another."""

_REPLACE_LAYERS = ("LORA", "IA3")
"""Those that put layers of their own in the place of the base's; the others hang on them."""

_LEAVES_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Initial values of LoRA that leave the base's weights alone; others (PiSSA, OLoRA, LoftQ) take a part out of them."""


class _Held(NamedTuple):
    adapter: Adapter
    inside: str
    """What PEFT knows it as; a name from outside may hold what PEFT cannot have in one, such as a dot."""


_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def _alone(
    change: Callable[Concatenate[AdapterPool, _Given], _Result],
) -> Callable[Concatenate[AdapterPool, _Given], _Result]:
    """Make a change wait until no thread is in a block that uses what is changed."""

    @wraps(change)
    def waits(pool: AdapterPool, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if pool._lock.shares_here():
            raise BadParams(
                "an adapter is changed within a block that uses one",
                got=f"{change.__name__}, while {pool.active or 'the bare base'} is in use",
                fix="end the block first",
            )
        with pool._lock.alone():
            return change(pool, *args, **kwargs)

    return waits


class AdapterPool:
    """A base and its adapters, of which at most one is in use, but for `together`.

    Threads may share it: what runs within `using` or `in_use` runs with one adapter, and changes wait until it ends.

    Args:
        base: a model without an adapter; it belongs to this object from here on.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._parameters = dict(base.named_parameters(remove_duplicate=False))
        self._tuned: PeftModel | None = None
        self._held: dict[str, _Held] = {}
        self._bare = children_of(base)
        self._methods: dict[str, MethodLayers] = {}
        """Layers that were put into the base, by method."""
        self._together: frozenset[str | None] = frozenset()
        """Adapters that are in use together; there is no active one then."""
        self._follow: set[str] = set()
        """What PEFT knows those as whose layers follow mixed batches."""
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self._layers: list[Any] = []
        self.active: str | None = None
        """The adapter in use."""
        self.merged: str | None = None
        """The adapter that is part of the weights now; it is then the active one."""
        self._lock = SharedLock()

    @property
    def model(self) -> Model:
        """Return the model with the adapter in use, or the bare base; read this again after every change."""
        return self._base if self._tuned is None else self._tuned

    @contextmanager
    def in_use(self) -> Iterator[Model]:
        """Keep what is in use as it is within this block; gives the model."""
        with self._lock.shared():
            yield self.model

    @contextmanager
    def using(self, name: str | None) -> Iterator[Model]:
        """Use an adapter, or for None the bare base, within this block; gives the model.

        Threads that use the same one run beside it.

        It stays in use afterwards. Threads that want another one wait until no block needs this one.

        Raises:
            BadParams: there is no such adapter, or this thread is in such a block with another one.
        """
        while True:
            with self._lock.shared():
                if self.active == name and not self._together:
                    yield self.model
                    return
            if name is None:
                self.off()
            else:
                self.use(name)

    @contextmanager
    def together(self, names: Sequence[str | None]) -> Iterator[Together]:
        """Use several adapters within this block, each for tokens of its own (`tasks.adapters.mixed_batch`).

        They are the first and those of the others, and the bare base, that can be used beside it. One alone is used as
        by `using`.

        Raises:
            BadParams: there is no such adapter, or this thread is in such a block with others.
        """
        beside = self._beside(names)
        while len(beside) > 1:
            with self._lock.shared():
                if self._together.issuperset(beside):
                    yield Together(self.model, {name: self._held[name].inside if name else None for name in beside})
                    return
            beside = self._use_together(beside)
        with self.using(beside[0]) as model:
            yield Together(model, {beside[0]: None})

    @property
    def kept_bytes(self) -> int:
        """Host memory that the touched weights' former values take while an adapter is merged; else 0.

        It is the size of the weights that the adapter changes and no more: nearly the model's for LoRA on all linear
        layers, a sixth of it for the queries and values of a Llama 2 with 7B parameters.
        """
        return sum(before.nbytes for _, before in self._kept)

    @_alone
    def load(self, name: str, folder: Path, *, any_base: bool = False) -> None:
        """Read an adapter and put it on the base once, so that it is known to fit; what was in use stays in use.

        Raises:
            BadParams: the name is taken.
            BadModel: the adapter is damaged, unknown, of another base, does not fit, or changes the base itself.
        """
        if name in self._held:
            raise BadParams("there is an adapter of this name already", got=name, expected="another name")
        if not any_base:
            check_base(folder, base_identity(self._base))
        adapter = read_adapter(folder)
        active, merged = self.active, self.merged
        self.unmerge()
        self._check_leaves_base(adapter)
        self._held[name] = _Held(adapter, f"adapter{len(self._held)}")
        try:
            self._put(name)
        except BadModel:
            del self._held[name]
            self.release()
            raise
        finally:
            if active is None:
                self.off()
            else:
                self.merge(active) if merged else self.use(active)

    @_alone
    def use(self, name: str) -> None:
        """Make an adapter the one in use.

        Raises:
            BadParams: there is no such adapter.
        """
        self.unmerge()
        tuned = self._put(name)
        if tuned.active_adapter != self._held[name].inside:
            tuned.set_adapter(self._held[name].inside, inference_mode=True)
        self.active = name

    @_alone
    def off(self) -> None:
        """Use the bare base; adapters stay beside it, so that the next use is quick."""
        self.unmerge()
        self._clear()
        self.active = None

    @_alone
    def release(self) -> PreTrainedModel:
        """Return the base as it was before any adapter, with all of them taken out; the next use puts one in again."""
        self.unmerge()
        self._clear()
        for layers in self._methods.values():
            layers.put_in()
            layers.tuned.unload()
        self._methods, self._follow, self.active = {}, set(), None
        return self._base

    def _clear(self, but: str = "") -> None:
        """Take the layers of all methods but one out of the base."""
        from tasks.adapters.prompt_tuning import count_as_before

        self._together = frozenset()
        kept = self._methods.get(but)
        for layers in self._methods.values():
            if layers is not kept:
                layers.take_out()
        if self._tuned is not None and not any(self._tuned is layers.tuned for layers in self._methods.values()):
            if not self._tuned.active_peft_config.is_prompt_learning:
                self._tuned.unload()
            count_as_before(self._base)
        self._tuned = kept.tuned if kept and kept.in_base else None

    @_alone
    def merge(self, name: str) -> None:
        """Merge an adapter into the weights, in place of the one that may be merged now.

        Raises:
            BadParams: there is no such adapter.
            BadModel: it cannot become part of weights, or not without rounding a quantized base.
        """
        self.use(name)
        layers = self._mergeable_layers(name)
        parameters = {id(p): p for layer in layers for p in layer.get_base_layer().parameters(recurse=False)}
        self._kept = [(p, p.detach().to("cpu", copy=True)) for p in parameters.values()]
        self._layers, self.merged = layers, name
        try:
            for layer in layers:
                layer.merge(adapter_names=[self._held[name].inside])
        except BaseException:
            self.unmerge()
            raise

    @_alone
    def unmerge(self) -> None:
        """Restore the weights to what they were, bit for bit; the adapter stays in use beside them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unmerge result can be inaccurate")  # it is not what is kept
            for layer in self._layers:
                if layer.merged:
                    layer.unmerge()  # for what PEFT remembers of it; the weights that this leaves are rounded
        for parameter, before in self._kept:
            parameter.data.copy_(before)
        self._kept, self._layers, self.merged = [], [], None

    def _beside(self, names: Sequence[str | None]) -> list[str | None]:
        """Return the first of some adapters, with those that can be used beside it."""
        chosen, methods = list[str | None](), set[str]()
        for name in names:
            method = self._method(name) if name is not None else None
            if not chosen or method is None or _lie_together(methods | {method}):
                chosen.append(name)
                methods |= {method} if method else set()
            if "" in methods:  # what lies beside nothing
                break
        return chosen

    @_alone
    def _use_together(self, names: Sequence[str | None]) -> list[str | None]:
        """Put adapters into the base whose layers follow mixed batches; returns them, or the first if it does not."""
        self.unmerge()
        held = {name: self._held[name].inside for name in names if name is not None}
        for name in held:
            self._put(name)
        self._clear()
        methods = [self._methods[method] for method in dict.fromkeys(map(self._method, held))]
        for layers in methods:
            layers.put_in()
        self._follow |= {
            inside for inside in held.values() if inside not in self._follow and prepare(self._base, inside)
        }
        follow = [name for name in names if name is None or held[name] in self._follow]
        if names[0] in follow and len(follow) > 1:
            self.active, self._tuned, self._together = None, methods[0].tuned, frozenset(follow)
            return follow
        self.off()
        return [names[0]]

    def _method(self, name: str) -> str:
        """Return the method of an adapter that lies beside others of it; empty for one that does not."""
        if name not in self._held:
            known = ", ".join(self._held) or "none was loaded"
            raise BadParams("there is no such adapter", got=name, expected=known)
        config = self._held[name].adapter.config
        kind = str(config.peft_type.value)
        # LoRA with trained biases changes the base's own
        return kind if kind in _BESIDE_EACH_OTHER and config.to_dict().get("bias", "none") == "none" else ""

    def _put(self, name: str) -> PeftModel:
        """Put an adapter on the model, whose method alone is then in the base. Return the model."""
        method, (adapter, inside) = self._method(name), self._held[name]
        if not method:
            if self._tuned is None or inside not in self._tuned.peft_config:
                self._clear()
                self._tuned = add_adapter(self._base, adapter, inside)
            return self._tuned
        self._clear(but=method)
        layers = self._methods.get(method)
        if layers:
            layers.put_in()
        if layers is None or inside not in layers.tuned.peft_config:
            tuned = add_adapter(layers.tuned if layers else self._base, adapter, inside)
            self._methods[method] = layers = MethodLayers(tuned, self._bare)
            self._follow = set()  # it may have layers of its own
        self._tuned = layers.tuned
        return self._tuned

    def _check_leaves_base(self, adapter: Adapter) -> None:
        """Refuse what would change the base for the other adapters too.

        PEFT stores with an adapter the embeddings that it touches and the biases that it may have trained, which it
        writes into the base; those must be the base's own. The modules that an adapter replaces stay in the base when
        PEFT takes it out.
        """
        config = adapter.config.to_dict()
        wrong = [f"{name}: {config[name]}" for name in ("layer_replication", "modules_to_save") if config.get(name)]
        if config.get("init_lora_weights", True) not in _LEAVES_BASE:
            wrong.append(f"init_lora_weights: {config['init_lora_weights']}")
        for name, tensor in adapter.state.items():
            own = self._parameters.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
            if not tensor.to(own).equal(own) if own is not None else ".base_layer." in name:
                wrong.append(f"{name}: not the weights of this base")
        if wrong:
            raise BadModel(
                "changes the base itself, which others share",
                where=str(adapter.where),
                examples=wrong,
                fix="merge it into a model of its own; or, where it began from a part of the base (PiSSA, OLoRA), "
                "convert it to plain LoRA (`path_initial_model_for_weight_conversion` of PEFT's save_pretrained)",
            )

    def _mergeable_layers(self, name: str) -> list[Any]:
        """Return the layers whose weights an adapter changes, after checking that it can become part of all of them."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        from tasks.adapters.hooks import HookedTuner

        (adapter, inside), tuned = self._held[name], self._put(name)
        where = str(adapter.where)
        layers = [m for m in tuned.modules() if isinstance(m, BaseTunerLayer) and inside in _adapters_of(m)]
        if isinstance(tuned.base_model, HookedTuner):
            raise BadModel(
                "cannot be merged", where=where, got=tuned.base_model.unmergeable, fix="use it without merging"
            )
        if not layers or any(type(layer).merge is BaseTunerLayer.merge for layer in layers):
            kind = str(adapter.config.peft_type.value)
            raise BadModel("cannot be merged", where=where, got=kind, expected="a method that adds to weights")
        weights = [layer.get_base_layer().weight for layer in layers]
        if not all(weight.is_floating_point() for weight in weights):
            raise BadModel(
                "would be rounded away in a quantized base", where=where, fix="load the base in 16 bit, or do not merge"
            )
        for weight in weights:
            if sum(own is weight for own in self._parameters.values()) > 1:
                raise BadModel(
                    "cannot be merged: it changes one of two layers that share their weights",
                    where=where,
                    fix="use it without merging",
                )
        return layers


def _adapters_of(layer: Any) -> set[str]:
    """Return the adapters that have a part in a layer."""
    return {name for group in layer.adapter_layer_names for name in getattr(layer, group)}


def _lie_together(methods: set[str]) -> bool:
    """Return whether the layers of some methods can be in a base at a time: all but two that replace its layers."""
    return "" not in methods and len(methods & set(_REPLACE_LAYERS)) < 2
