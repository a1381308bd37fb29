"""The published form of an adapter on disk, which is PEFT's, and what it says of the base model that it belongs to.

`adapter_config.json` and `adapter_model.safetensors` are what PEFT reads. `base.json` beside them names the base; PEFT
passes over it. Adapters of other makers lack it: theirs say at most a name, in the configuration.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.errors import BadModel
from tasks.fields import COMMIT, HUB_NAME
from tasks.outputs import MANIFEST, as_json, digest, write_whole

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
PUBLISHED = (CONFIG, WEIGHTS, BASE)
"""The files of a published adapter."""

PICKLE = "adapter_model.bin"


class Base(NamedTuple):
    """Which model a base is, as far as it is known."""

    name: str | None
    """Owner and name on the Hugging Face hub."""
    revision: str | None
    """The whole hash of a commit there."""
    weights_sha256: str | None
    """One digest over those of its safetensors files, by name."""


UNKNOWN = Base(None, None, None)


# --- the base ---------------------------------------------------------------------------------------------------------


def base_of(model: Path) -> Base:
    """Which base a model folder is: by its manifest, or by its weights when it has none."""
    manifest = _object(model / MANIFEST) if (model / MANIFEST).is_file() else {"files": {}}
    known = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    lines = "".join(f"{name} {known.get(name) or digest(model / name)}\n" for name in shards)
    weights = hashlib.sha256(lines.encode()).hexdigest() if shards else None
    made = manifest.get("base", {})
    hub = made.get("kind") == "hub"
    return Base(made["id"] if hub else None, made["revision"] if hub else None, weights)


def write_base(folder: Path, base: Base) -> None:
    """Writes into an adapter's folder which base it is of."""
    write_whole(folder / BASE, as_json(base._asdict()))


def said_base(folder: Path) -> Base:
    """Which base an adapter says that it is of.

    Raises:
        BadModel: what it says cannot be read.
    """
    if (folder / BASE).is_file():
        said = _object(folder / BASE)
        if said.keys() != set(Base._fields) or not all(v is None or isinstance(v, str) for v in said.values()):
            raise BadModel(
                "does not say which base it is of", where=str(folder / BASE), expected=", ".join(UNKNOWN._fields)
            )
        return Base(**said)
    config = _object(folder / CONFIG)
    name, revision = (str(config.get(key)) for key in ("base_model_name_or_path", "revision"))
    return Base(  # a name may as well be a path of its maker's disk, and a revision a branch
        name if re.fullmatch(HUB_NAME, name) else None, revision if re.fullmatch(COMMIT, revision) else None, None
    )


def check_base(folder: Path, base: Base) -> None:
    """Refuses an adapter of another base; the same weights are the same base whatever they are called.

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


# --- the adapter ------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a published adapter, after checking that it is safe to follow.

    Raises:
        BadModel: there is none, or it asks for code or for further adapters to be loaded.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadModel("is no adapter", where=str(folder), got=f"no {CONFIG}", expected=", ".join((CONFIG, WEIGHTS)))
    config = _object(path)
    if asks := sorted(_code_in(config)):
        raise BadModel(
            "asks to run its own code; refused", where=str(path), got=", ".join(asks), fix="remove these keys"
        )
    if config.get("peft_type") == "XLORA":
        raise BadModel(
            "names further adapters to load; refused", where=str(path), got="XLORA", fix="use one of those adapters"
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a published adapter.

    Raises:
        BadModel: there are none, they are pickled, torn, or hold a number that is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise BadModel(
            "is torn, or no safetensors file", where=str(path), got=str(error), fix="fetch it again"
        ) from error
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise BadModel("has values that are not finite; refused", where=str(folder), examples=broken)
    return state


def _code_in(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys by which PEFT, or a library that it calls, would import a module that the configuration names."""
    for key, value in config.items():
        library = value.get("parent_library") if key == "auto_mapping" and isinstance(value, Mapping) else None
        if (key in ("auto_map", "trust_remote_code", "megatron_config") and value) or (
            library and not str(library).startswith("transformers.")
        ):
            yield prefix + key
        elif isinstance(value, Mapping):
            yield from _code_in(value, f"{prefix}{key}.")


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel("is not valid JSON", where=str(path), got=str(error)) from error
    if not isinstance(content, dict):
        raise BadModel("is not a JSON object", where=str(path), got=type(content).__name__)
    return content
