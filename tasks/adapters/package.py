"""Models whose adapter stays beside the weights: a folder with the adapter, and a reference to the base.

The reference names the base by the digest of its weights, by its path from the folder, and by name and commit where it
is of the hub. Tokenizer, chat template and configuration are in the folder itself. A registered version keeps a base
that only this disk has beside the folder.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tasks.adapters.files import PUBLISHED, identify_base
from tasks.core.artifacts import as_json, check_manifest, read_object
from tasks.core.errors import BadModel
from tasks.core.hub import snapshot
from tasks.models.loader import MODEL_FILES, model_files
from tasks.models.safetensors_reader import INDEX

FOLDER = "adapter"
"""Where a model folder keeps an adapter that cannot be merged."""

REFERENCE = "reference.json"
"""Where it says which base the adapter is of."""

BASE_FOLDER = "base"
"""What the base's folder is called where both stand beside each other."""


def package(base: Path, trained: Path, folder: Path, out: Path) -> None:
    """Write an adapter and what belongs to it of a base, but not the base's weights, into an empty folder.

    Args:
        base: a model folder.
        trained: the folder of the adapter.
        folder: the folder to fill.
        out: where it will stand; the path to the base is seen from there.
    """
    for file in model_files(base):
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    (folder / FOLDER).mkdir()
    for name in PUBLISHED:
        shutil.copyfile(trained / name, folder / FOLDER / name)
    told = {**identify_base(base)._asdict(), "path": os.path.relpath(base.resolve(), out.resolve())}
    (folder / REFERENCE).write_text(as_json(told))


def base_in(folder: Path, given: Path | None = None) -> Path:
    """Find the folder with the weights of a model: its own, or that of the base that it refers to.

    Args:
        folder: a model folder.
        given: where the base is, if it is known to the caller.

    Raises:
        BadModel: the base is not where it was, or its weights are others.
        BadInput, Transient: it is of the hub, which does not have it, or does not answer.
    """
    if not (folder / REFERENCE).is_file():
        return folder
    told = read_object(folder / REFERENCE)
    places = [given] if given else [folder / str(told.get("path")), folder.parent / BASE_FOLDER]
    place = next((each for each in places if (each / "config.json").is_file()), places[0])
    if not (place / "config.json").is_file() and is_of_hub(folder):
        place = snapshot(str(told["name"]), str(told["revision"]), MODEL_FILES, kind="model")
    found = _weights(place) if (place / "config.json").is_file() else "no model there"
    if found != told.get("weights_sha256"):
        raise BadModel(
            "refers to a base that is not where it was",
            where=str(folder / REFERENCE),
            got=f"{place}: {found}",
            expected=f"weights with the digest {told.get('weights_sha256')}",
            fix="bring the base back to its place",
        )
    return place


def is_of_hub(folder: Path) -> bool:
    """Return whether the base of a packaged model is available from the hub by its name and commit."""
    told = read_object(folder / REFERENCE)
    return bool(told.get("name") and told.get("revision"))


def _weights(base: Path) -> str | None:
    """Compute the digest of a base's weights, after checking them against its manifest, if it has one."""
    check_manifest(base)
    return identify_base(base).weights_sha256
