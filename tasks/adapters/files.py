"""The published form of an adapter on disk, which is PEFT's, and what it says of the base model that it belongs to.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads. `base.json` beside them names the base; PEFT
passes over it. Adapters of other makers lack it: theirs say at most a name, in the configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from tasks.core.artifacts import MANIFEST, as_json, atomic_write, digest, read_object
from tasks.core.errors import BadModel
from tasks.core.params import COMMIT, HUB_NAME
from tasks.models.device import host_read

if TYPE_CHECKING:
    from torch import Tensor


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"

PUBLISHED = (CONFIG, WEIGHTS, BASE_FILE)
"""The files of a published adapter."""
PICKLE = "adapter_model.bin"


class Base(NamedTuple):
    """Identity of a base model, as far as it is known."""

    name: str | None
    """Owner and name on the Hugging Face hub."""
    revision: str | None
    """The whole hash of a commit there."""
    weights_sha256: str | None
    """One digest over those of its safetensors files, by name."""


UNKNOWN = Base(None, None, None)


def identify_base(model: Path, *, hashed: bool = True) -> Base:
    """Identify the base of a model folder: by its manifest, or by its weights when it has none.

    `hashed` also gives the digest of the weights; those that no manifest lists are read for it.
    """
    manifest = _manifest(model)
    made = manifest.base
    hub = made.kind == "hub"
    weights = _weights_of(model, manifest) if hashed else None
    return Base(made.id if hub else None, made.revision if hub else None, weights)


def _weights_of(model: Path, manifest: _Manifest) -> str | None:
    known = {name: entry.sha256 for name, entry in manifest.files.items()}
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    lines = "".join(f"{name} {known.get(name) or digest(model / name)}\n" for name in shards)
    return hashlib.sha256(lines.encode()).hexdigest() if shards else None


class _File(BaseModel):
    sha256: str


class _Origin(BaseModel):
    kind: str = ""
    id: str | None = None
    revision: str | None = None


class _Manifest(BaseModel):
    """Fields that are read of a manifest of temper's own."""

    files: dict[str, _File] = {}
    base: _Origin = _Origin()


def _manifest(model: Path) -> _Manifest:
    """Read the manifest of a model folder; ignore a third-party file of that name."""
    path = model / MANIFEST
    try:
        return _Manifest.model_validate_json(path.read_bytes()) if path.is_file() else _Manifest()
    except ValidationError:
        return _Manifest()


def write_base(folder: Path, base: Base) -> None:
    """Write into an adapter's folder which base it is of."""
    atomic_write(folder / BASE_FILE, as_json(base._asdict()))


def said_base(folder: Path) -> Base:
    """Read which base an adapter names.

    Raises:
        BadModel: it is no adapter, or what it says cannot be read.
    """
    if (folder / BASE_FILE).is_file():
        said = read_object(folder / BASE_FILE)
        if said.keys() != set(Base._fields) or not all(v is None or isinstance(v, str) for v in said.values()):
            raise BadModel(
                "does not say which base it is of", where=str(folder / BASE_FILE), expected=", ".join(UNKNOWN._fields)
            )
        return Base(**said)
    config = read_adapter_config(folder)
    name, revision = (str(config.get(key)) for key in ("base_model_name_or_path", "revision"))
    return Base(  # a name may as well be a path of its maker's disk, and a revision a branch
        name if re.fullmatch(HUB_NAME, name) else None, revision if re.fullmatch(COMMIT, revision) else None, None
    )


def check_base_folder(folder: Path, model: Path) -> None:
    """Run `check_base` on a base in a folder, whose weights are read only where the adapter names theirs."""
    check_base(folder, identify_base(model, hashed=said_base(folder).weights_sha256 is not None))


def check_base(folder: Path, base: Base) -> None:
    """Refuse an adapter of another base; the same weights are the same base whatever they are called.

    Raises:
        BadModel: name, revision or weights are known of both and differ.
    """
    said = said_base(folder)
    if said.weights_sha256 and said.weights_sha256 == base.weights_sha256:
        return
    wrong = [
        f"{field.replace('_', ' ')}: the adapter is of {theirs}, the base is {ours}"
        for field, theirs, ours in zip(Base._fields, said, base, strict=True)
        if theirs and ours and theirs.casefold() != ours.casefold()
    ]
    if wrong:
        raise BadModel(
            "is an adapter for another base",
            where=str(folder),
            examples=wrong,
            fix="use the base that it was trained on, or say --any-base if you know that it fits this one",
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a published adapter, after checking that it is safe to follow.

    Raises:
        BadModel: there is none, or it asks for code or for further adapters to be loaded.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadModel("is no adapter", where=str(folder), got=f"no {CONFIG}", expected=", ".join((CONFIG, WEIGHTS)))
    config = read_object(path)
    if asks := sorted(_code_in(config)):
        raise BadModel(
            "asks to run its own code; refused", where=str(path), got=", ".join(asks), fix="remove these keys"
        )
    if config.get("peft_type") == "XLORA":
        raise BadModel(
            "names further adapters to load; refused", where=str(path), got="XLORA", fix="use one of those adapters"
        )
    return config


def weights_file(folder: Path) -> Path:
    """Return the file with the tensors of a published adapter.

    Raises:
        BadModel: there is none, or they are pickled.
    """
    path = folder / WEIGHTS
    if not path.is_file() and (folder / PICKLE).is_file():
        raise BadModel(
            "pickle weights are refused: loading them can run any code",
            where=str(folder),
            got=PICKLE,
            expected=WEIGHTS,
            fix="convert the weights to safetensors where you trust them",
        )
    if not path.is_file():
        raise BadModel("has no weights", where=str(folder), expected=WEIGHTS)
    return path


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a published adapter.

    Raises:
        BadModel: there are none, they are pickled, torn, or hold a number that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = weights_file(folder)
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise BadModel(
            "is torn, or no safetensors file", where=str(path), got=str(error), fix="fetch it again"
        ) from error
    if broken := [
        name for name, tensor in state.items() if not tensor.float().isfinite().all()
    ]:  # 8 bits know no isfinite
        raise BadModel("has values that are not finite; refused", where=str(folder), examples=broken)
    return state


def _code_in(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys by which PEFT, or a library that it calls, would import a module that the configuration names."""
    for key, value in config.items():
        library = value.get("parent_library") if key == "auto_mapping" and isinstance(value, Mapping) else None
        if (key in ("auto_map", "trust_remote_code", "megatron_config") and value) or (
            library and not str(library).startswith("transformers.")
        ):
            yield prefix + key
        elif isinstance(value, Mapping):
            yield from _code_in(value, f"{prefix}{key}.")


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the host, in one piece, and none in the memory of another."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        with host_read("tensors that are written to a file"):
            whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return found
