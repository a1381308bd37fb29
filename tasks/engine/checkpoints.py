"""Checkpoints of trainings: whole folders outside the stage's outputs, named by what the stage reads.

A checkpoint holds the trained tensors, the optimizers, the random state and the log so far, so that a resumed
training gives the same bits as one that was never stopped. One that is not whole, or was altered, is never used: the
one before it is.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tasks.adapters.files import apart
from tasks.core.artifacts import as_json, atomic_folder, read_manifest
from tasks.core.errors import BadData, BadInput
from tasks.models.device import host_read

if TYPE_CHECKING:
    from torch import Tensor


KEPT = 2


class Stepper(Protocol):
    """An optimizer, or what else acts after each step and has a state of tensors."""

    param_groups: list[dict[str, Any]]

    def step(self) -> object:
        """Act on the current gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """`state`: for each number its tensors by name; `param_groups`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class Checkpoint(NamedTuple):
    """The state of a training between two steps.

    Attributes:
        step: how many steps were taken.
        tensors: what `pack_tensors` made.
        log: one row per step.
        optimizers: what `structure_of` says of them; the key of a checkpoint says nothing of the code that wrote it.
    """

    step: int
    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]


def checkpoint_folder(workspace: Path, key: str) -> Path:
    """Return the folder of the checkpoints of a stage with this content key."""
    return workspace / ".temper" / "checkpoints" / key


def check_writable(folder: Path) -> None:
    """Make the folder of a training's checkpoints, before any work is done that could not be saved.

    Raises:
        BadInput: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk may be freed
        raise BadInput(
            "checkpoints cannot be written", where=str(folder), got=str(error.strerror), fix="make it a writable folder"
        ) from error


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole, then remove all but the newest two."""
    from safetensors.torch import save_file

    with atomic_folder(folder / f"step-{checkpoint.step:08d}") as draft:
        save_file(apart(checkpoint.tensors), draft / "state.safetensors")
        (draft / "state.json").write_text(
            as_json(
                {
                    "step": checkpoint.step,
                    "training": folder.name,
                    "log": checkpoint.log,
                    "optimizers": checkpoint.optimizers,
                }
            )
        )
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint that is whole and unaltered; report any that it passes over.

    Raises:
        BadData: it was written by another training, of which it bears the key.
    """
    from safetensors.torch import load_file

    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except BadData as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
            continue
        state = json.loads((path / "state.json").read_text())
        if missing := sorted({"step", "training", "log", "optimizers"} - state.keys()):
            raise _of_another(path, f"one without {', '.join(missing)}", "a checkpoint of this version of temper")
        if state["training"] != folder.name:
            raise _of_another(path, f"a checkpoint of {state['training']}", folder.name)
        return Checkpoint(state["step"], load_file(path / "state.safetensors"), state["log"], state["optimizers"])
    return None


def _of_another(path: Path | str, got: str, expected: str) -> BadData:
    return BadData(
        "the checkpoint is of another training",
        where=str(path),
        got=got,
        expected=expected,
        fix="remove the folder: the training then begins anew",
    )


def pack_tensors(
    parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper], best: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Parameters, the best ones so far, optimizer states and the random state, as one flat mapping of tensors."""
    import torch

    tensors = {f"parameter/{name}": tensor for name, tensor in parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in (best or {}).items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():  # bitsandbytes has what is in 8 bits in a mapping of its own
                named = value if isinstance(value, dict) else {name: value}
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(each) for key, each in named.items()}
        for index, group in enumerate(optimizer.param_groups):  # schedule-free counts its steps there
            numbers = {name: value for name, value in group.items() if isinstance(value, int | float)}
            tensors |= {
                f"group/{number}/{index}/{n}": torch.tensor(float(v), dtype=torch.float64) for n, v in numbers.items()
            }
    return tensors | random_state()


def unpack_tensors(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper], where: str = ""
) -> dict[str, Tensor]:
    """Restore what `pack_tensors` took; return the best parameters so far, if there were any.

    Raises:
        BadData: the parameters are not those of the same configuration.
    """
    import torch

    _check_same(tensors, parameters, where)
    with torch.no_grad():  # not through .data, whose changes rotations would not notice
        for name, tensor in parameters.items():
            saved = tensors[f"parameter/{name}"].to(tensor)
            if not _same_bits(tensor, saved):  # nor may they take a step that was skipped for a change
                tensor.copy_(saved)
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer/{number}/"):
                _, _, index, field = name.split("/")
                counts = tensor.ndim == 0 and not tensor.is_floating_point()  # bitsandbytes wants a plain number
                states.setdefault(int(index), {})[field] = tensor.item() if counts else tensor
        groups = optimizer.state_dict()["param_groups"]
        for place, group in enumerate(groups):
            for field, value in group.items():
                if (kept := tensors.get(f"group/{number}/{place}/{field}")) is not None:
                    group[field] = type(value)(kept.item())
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    set_random_state(tensors)
    on = {name: tensor.device for name, tensor in parameters.items()}
    return {name: tensors[f"best/{name}"].to(on[name]) for name in parameters if f"best/{name}" in tensors}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and type are the same to the bit; zeros differ by their sign."""
    import torch

    with host_read("whether weights are those of a checkpoint, as a training goes on"):
        return torch.equal(one.detach().flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _check_same(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], where: str) -> None:
    kept = {name.partition("/")[2]: tuple(t.shape) for name, t in tensors.items() if name.startswith("parameter/")}
    wanted = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if kept != wanted:
        odd = sorted(name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name))[0]
        raise _of_another(where, f"{odd}: {kept.get(odd, 'is missing')}", f"{wanted.get(odd, 'no such parameter')}")


def structure_of(optimizers: Sequence[Stepper]) -> list[dict[str, Any]]:
    """Return each optimizer's class, and the number of tensors in each of its groups."""
    return [
        {"class": type(optimizer).__name__, "groups": [len(group["params"]) for group in optimizer.param_groups]}
        for optimizer in optimizers
    ]


def check_structure(found: Checkpoint, optimizers: Sequence[Stepper], where: str) -> None:
    """Refuse a checkpoint whose optimizers are not those of this training.

    Raises:
        BadData: a class, or a number of groups or tensors differs.
    """
    wanted = structure_of(optimizers)
    if found.optimizers != wanted:
        raise _of_another(where, f"optimizers {json.dumps(found.optimizers)}", json.dumps(wanted))


def random_state() -> dict[str, Tensor]:
    """Return the state of the generators that a training draws from."""
    import torch

    state = {"random/cpu": torch.get_rng_state()}
    return state | {"random/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` gave."""
    import torch

    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
