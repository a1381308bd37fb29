"""A pretended accelerator: what would fail or wait on a GPU is found on a machine that has none.

Tensors on PyTorch's meta device stand for those on an accelerator, and PyTorch treats them as such: a factory makes
them where it is told to, `.to` moves them, views share their storage. Here each storage on that device holds its
numbers as well, in the host's memory, so that every operation gives what it gives on a CPU, and whatever depends on
numbers goes on: a check, a sample, the end of an answer.

    with PretendedDevice() as pretended:
        model = pretended.take(model)
        ...

Two things are refused, with the line of our own code: an operation on tensors of both sides, one dimension or more
each, which a GPU refuses or makes up for by a copy that it waits for; and what the host reads of the device outside of
`tasks.models.device.host_read`, for which it waits until the device has done all that was asked of it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.core.errors import TemperError
from tasks.models.device import reason_to_read

DEVICE = torch.device("meta")
"""What the pretended accelerator is called."""

M = TypeVar("M", bound=nn.Module)

_ATEN = torch.ops.aten
_ROOT, _PACKAGES = Path(__file__).resolve().parents[2], Path(torch.__file__).resolve().parents[1]
_MOVES = {_ATEN._to_copy.default, _ATEN.copy_.default}
_READ = {  # their results, or the shapes of these, are numbers that the host waits for
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.bincount.default,
    _ATEN.repeat_interleave.Tensor,
    _ATEN._unique2.default,
    _ATEN.unique_dim.default,
    _ATEN.unique_consecutive.default,
}
_BY_PLACES = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}


class DeviceFault(TemperError):
    """What a GPU would refuse, or make the host wait for."""


class Crossing(NamedTuple):
    """Numbers that went from the device to the host, or the other way.

    Attributes:
        operation: what moved them.
        line: of our own code, as `file:line`.
        reason: why the host is meant to read them; empty for the other way.
    """

    operation: str
    line: str
    reason: str


class Operation(NamedTuple):
    """Operation in a floating-point type, and whether our own code asked for it, not a library or autograd."""

    name: str
    dtype: torch.dtype
    own: bool


class PretendedDevice(TorchDispatchMode):
    """Computes on the pretended device within a block; at its end it raises the first fault, whoever swallowed it.

    Attributes:
        reads: what the host read of the device.
        uploads: what it moved there and waited for, as it does but for `tasks.models.device.upload`.
        operations: how often each was computed, in fp16 and bf16.

    Raises:
        DeviceFault: an operation mixed devices, or the host read where it is not meant to.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: list[Crossing] = []
        self.uploads: list[Crossing] = []
        self.operations: Counter[Operation] = Counter()
        self._fault: DeviceFault | None = None
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        stack = ExitStack()
        stack.enter_context(_generators_of_the_device())
        stack.enter_context(_Calls(self))
        self._entered.append(stack)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._entered.pop().close()
        if self._fault is not None and kind is None:
            raise self._fault

    def take(self, model: M) -> M:
        """Move a model to the device, in place; weights that several modules hold stay one."""
        moved: dict[Tensor, Any] = {}

        def move(tensor: Tensor) -> Any:
            if tensor not in moved:
                plain = type(tensor) in (Tensor, nn.Parameter)  # others, of bitsandbytes, know more than their numbers
                made: Any = _on_device(tensor.detach().clone(), {}) if plain else tensor.to(DEVICE)
                moved[tensor] = nn.Parameter(made, tensor.requires_grad) if type(tensor) is nn.Parameter else made
            return moved[tensor]

        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: move(tensor) for name, tensor in held.items() if tensor is not None})
        return model

    # --- one operation ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors_in((*args, *kwargs.values())))
        inside, target = any(t.is_meta for t in given), kwargs.get("device")
        to_device = target is not None and target.type == DEVICE.type
        if not (inside or to_device):
            return func(*args, **kwargs)
        if func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # shapes and strides alone
        operation = _name(func)
        result_on_device = inside if target is None else to_device
        if func in _MOVES:
            result_on_device = args[0].is_meta if func is _ATEN.copy_.default else result_on_device
            source, waits = (
                args[1] if func is _ATEN.copy_.default else args[0],
                not _is_asynchronous(func, args, kwargs),
            )
            if source.is_meta and not result_on_device:
                self._read(operation)
            elif result_on_device and not source.is_meta and source.numel() and waits:
                self.uploads.append(Crossing(operation, _own_line(), ""))
        else:
            self._check_sides(operation, given)
        if _waits_for_numbers(func, args, kwargs):
            self._read(operation)
        storages: dict[int, UntypedStorage] = {}
        originals: dict[int, Tensor] = {}

        def numbers(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            found = _numbers_of(tensor)
            if found is None:
                self.refuse(
                    f"{operation} needs the numbers of a tensor that has none",
                    where=_own_line(),
                    got=f"{tuple(tensor.shape)}, {tensor.dtype}",
                    fix="use a tensor for an index, not a list; and make tensors within the block",
                )
            storages[found.untyped_storage()._cdata] = tensor.untyped_storage()
            originals[id(found)] = tensor
            return found

        def on_device(tensor: Tensor) -> Tensor:
            return originals[id(tensor)] if id(tensor) in originals else _on_device(tensor, storages)

        args, kwargs = _mapped(numbers, args), {name: _mapped(numbers, value) for name, value in kwargs.items()}
        output = func(*args, **({**kwargs, "device": torch.device("cpu")} if target is not None else kwargs))
        self.record(operation, [*given, *_tensors_in((output,))])
        return _mapped(on_device if result_on_device else lambda t: originals.get(id(t), t), output)

    def _read(self, operation: str) -> None:
        reason, line = reason_to_read(), _own_line()
        self.reads.append(Crossing(operation, line, reason))
        if not reason:
            self.refuse(
                f"{operation} makes the host wait for the device",
                where=line,
                fix="compute it on the device, or from what the host knows; if it is meant, say so by `host_read`",
            )

    def _check_sides(self, operation: str, given: Sequence[Tensor]) -> None:
        if any(not tensor.is_meta and tensor.dim() > 0 for tensor in given):
            shapes = ", ".join(f"{tuple(t.shape)} on the {'device' if t.is_meta else 'host'}" for t in given)
            self.refuse(
                f"{operation} mixes tensors of the device with tensors of the host",
                where=_own_line(),
                got=shapes,
                fix="make them where the model is: device=model.device, or .to(...) once for a whole batch",
            )

    def refuse(self, what: str, **more: str) -> NoReturn:
        """Raise a fault, and again at the end of the block."""
        fault = DeviceFault(what, **more)
        self._fault = self._fault or fault
        raise fault

    def record(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count an operation on these tensors, if it is one in 16 bits."""
        for dtype in {tensor.dtype for tensor in tensors} & {torch.float16, torch.bfloat16}:
            self.operations[Operation(name, dtype, _is_own())] += 1


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments or results, which are in lists or tuples at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, each) for each in value) if type(value) in (list, tuple) else value


# --- numbers ----------------------------------------------------------------------------------------------------------


def _numbers_of(tensor: Tensor) -> Tensor | None:
    """Return a tensor of the host that has the numbers of one on the device, and shares them; None if it has none."""
    held: UntypedStorage | None = vars(tensor.untyped_storage()).get("numbers")
    if held is None:
        return None
    return torch.empty(0, dtype=tensor.dtype).set_(held, tensor.storage_offset(), tensor.shape, tensor.stride())


def _on_device(numbers: Tensor, storages: dict[int, UntypedStorage]) -> Tensor:
    """Return a tensor on the device for one of the host; `storages` has the device's storages by those they stand for.

    Numbers are shared, and so is the storage of tensors that share theirs.
    """
    held = numbers.untyped_storage()
    if held._cdata not in storages:
        storages[held._cdata] = UntypedStorage(held.nbytes(), device=DEVICE)
        vars(storages[held._cdata])["numbers"] = held
    made = torch.empty(0, dtype=numbers.dtype, device=DEVICE)
    return made.set_(storages[held._cdata], numbers.storage_offset(), numbers.shape, numbers.stride())


def _waits_for_numbers(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the host waits for what an operation gives: a number, or how much there is of it."""
    if func in _BY_PLACES:
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        one_number = func is not _ATEN.index.Tensor and args[2].numel() == 1  # then it is a `masked_fill`
        return masks and not one_number
    return func in _READ and kwargs.get("output_size") is None


def _is_asynchronous(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or (func is _ATEN.copy_.default and len(args) > 2 and args[2]))


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


# --- lines of code ----------------------------------------------------------------------------------------------------


@cache
def _place_of(file: str) -> str:
    """Return the part of our own code that a file is, or `torch` or `library`; empty for this module."""
    path = Path(file)
    if file == __file__:
        return ""
    if path.is_relative_to(_PACKAGES):
        return "torch" if path.is_relative_to(_PACKAGES / "torch") else "library"
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "library"


def _frames() -> Iterator[tuple[str, FrameType]]:
    """Yield the calls that led here, the innermost first, each with its place."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if place := _place_of(frame.f_code.co_filename):
            yield place, frame
        frame = frame.f_back


def _own_line() -> str:
    """Return the innermost line of our own code that led here."""
    own = ((place, frame) for place, frame in _frames() if place not in ("torch", "library"))
    return next((f"{place}:{frame.f_lineno}" for place, frame in own), "no line of our own")


def _is_own() -> bool:
    """Return whether our own code asks for the present operation itself: not a library, nor autograd."""
    place, frame = next(((place, frame) for place, frame in _frames() if place != "torch"), ("library", None))
    differentiates = torch._C._current_graph_task_id() != -1 and (frame is None or frame.f_code.co_name != "backward")
    return place != "library" and not differentiates


# --- what never gets to an operation ----------------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Sees calls before PyTorch does.

    Literals on the device get their numbers, where PyTorch makes empty tensors on the meta device; and a generator is
    known by its class, which operations do not get to see.
    """

    def __init__(self, pretended: PretendedDevice) -> None:
        super().__init__()
        self._pretended = pretended

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:  # is one kernel on a GPU, and many operations here
            self._pretended.record(func.__name__, _tensors_in(args))
        if func is Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"device": args[0].device, **kwargs}
        if func in (torch.tensor, torch.as_tensor):
            target = kwargs.get("device")
            made = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return made if target is None else made.to(target)
        if isinstance(generator := kwargs.get("generator"), _Generator):
            drawn = func(*args, **kwargs)
            if drawn.is_meta != isinstance(generator, _DeviceGenerator):
                self._pretended.refuse(
                    f"{func.__name__} draws by a generator of the other side",
                    where=_own_line(),
                    fix="make it where the numbers are drawn: torch.Generator(device)",
                )
            return drawn
        return func(*args, **kwargs)


_Generator = torch.Generator


class _DeviceGenerator(_Generator):
    """Stands for a generator on the device."""


class _Either(type):
    """Stands in for `torch.Generator`: makes generators of either side, and both are instances."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return _DeviceGenerator() if torch.device(device).type == DEVICE.type else _Generator(device)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)


@contextmanager
def _generators_of_the_device() -> Iterator[None]:
    """Let `torch.Generator(device)` give one for the pretended device, too."""
    torch.Generator = _Either("Generator", (), {})  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.Generator = _Generator  # type: ignore[misc]
