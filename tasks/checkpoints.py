"""Where a training can go on from: whole folders outside the stage's outputs, named by what the stage reads.

A checkpoint holds the trained tensors, the optimizers, the random state and the log so far, so that a resumed
training gives the same bits as one that was never stopped. One that is not whole, or was altered, is never used: the
one before it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tasks.errors import BadData
from tasks.outputs import as_json, read_manifest, whole_folder

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2


class Stepper(Protocol):
    """An optimizer, or what else acts after each step and has a state of tensors."""

    param_groups: list[dict[str, Any]]

    def step(self) -> object:
        """Acts on the gradients there are."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """`state`: for each number its tensors by name; `param_groups`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""


class Checkpoint(NamedTuple):
    """The state after `step` steps. `log` has one row per step."""

    step: int
    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]


def checkpoint_folder(workspace: Path, key: str) -> Path:
    """Where the checkpoints of a stage with this content key are."""
    return workspace / ".temper" / "checkpoints" / key


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the host, in one piece, and none in the memory of another."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return found


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint whole, then removes all but the newest two."""
    from safetensors.torch import save_file

    with whole_folder(folder / f"step-{checkpoint.step:08d}") as draft:
        save_file(apart(checkpoint.tensors), draft / "state.safetensors")
        (draft / "state.json").write_text(as_json({"step": checkpoint.step, "log": checkpoint.log}))
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole and unaltered; says so when it has to pass one over."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except BadData as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
            continue
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(state["step"], load_file(path / "state.safetensors"), state["log"])
    return None


def pack(parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper]) -> dict[str, Tensor]:
    """Parameters, optimizer states and the random state, as one flat mapping of tensors."""
    import torch

    tensors = {f"parameter/{name}": tensor for name, tensor in parameters.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():  # bitsandbytes has what is in 8 bits in a mapping of its own
                named = value if isinstance(value, dict) else {name: value}
                tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(each) for key, each in named.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def unpack(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizers: Sequence[Stepper]) -> None:
    """Puts back what `pack` took; the parameters and optimizers must be those of the same configuration."""
    import torch

    with torch.no_grad():  # not through .data, whose changes rotations would not notice
        for name, tensor in parameters.items():
            tensor.copy_(tensors[f"parameter/{name}"])
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer/{number}/"):
                _, _, index, field = name.split("/")
                counts = tensor.ndim == 0 and not tensor.is_floating_point()  # bitsandbytes wants a plain number
                states.setdefault(int(index), {})[field] = tensor.item() if counts else tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
