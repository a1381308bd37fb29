"""An adapter that stays beside the weights, with a reference to its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tasks.adapters.attach import attach, load_packaged
from tasks.adapters.package import FOLDER, REFERENCE, base_in, package
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData, BadModel
from tasks.models.loader import load_model
from tests.tasks.adapters.test_attach import logits
from tests.tasks.adapters.test_files import published


@pytest.fixture
def place(pico_base: Path, tmp_path: Path) -> Path:
    """A folder with `base`, as a stage writes it, and `models/reft`, which refers to it."""
    with atomic_folder(tmp_path / "base") as draft:
        shutil.copytree(pico_base, draft, dirs_exist_ok=True)
    adapter = published(tmp_path / "base", "loreft", tmp_path / "trained")
    with atomic_folder(tmp_path / "models" / "reft") as draft:
        package(tmp_path / "base", adapter, draft, tmp_path / "models" / "reft")
    return tmp_path


def test_it_holds_no_weights_but_the_adapter_s_and_loads_with_one_call(place: Path, pico_base: Path) -> None:
    model = place / "models" / "reft"
    assert [path.relative_to(model).parts[0] for path in model.rglob("*.safetensors")] == [FOLDER]
    assert json.loads((model / REFERENCE).read_text())["path"] == "../../base"
    assert torch.equal(logits(load_packaged(model)), logits(attach(load_model(pico_base), place / "trained")))


def test_it_is_found_wherever_both_are_moved_together_or_where_it_is_told(place: Path, tmp_path: Path) -> None:
    shutil.move(place / "models", place / "elsewhere" / "models")
    with pytest.raises(BadModel, match="refers to a base that is not where it was"):
        base_in(place / "elsewhere" / "models" / "reft")
    assert base_in(place / "elsewhere" / "models" / "reft", place / "base") == place / "base"
    shutil.move(place / "base", place / "elsewhere" / "base")
    load_packaged(place / "elsewhere" / "models" / "reft")


def test_it_is_found_beside_the_folder_as_a_registered_version_keeps_it(place: Path, tmp_path: Path) -> None:
    shutil.move(place / "models" / "reft", tmp_path / "artifacts" / "reft")
    shutil.move(place / "base", tmp_path / "artifacts" / "base")
    assert base_in(tmp_path / "artifacts" / "reft") == tmp_path / "artifacts" / "base"


def test_a_base_of_the_hub_is_fetched_by_its_commit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = place / "models" / "reft"
    told = {**json.loads((model / REFERENCE).read_text()), "name": "owner/base", "revision": "a" * 40}
    (model / REFERENCE).write_text(json.dumps(told))
    shutil.move(place / "base", tmp_path / "cached")
    asked = []

    def snapshot(name: str, revision: str, patterns: object, *, kind: str) -> Path:
        asked.append((name, revision, kind))
        return tmp_path / "cached"

    monkeypatch.setattr("tasks.adapters.package.snapshot", snapshot)
    assert base_in(model) == tmp_path / "cached"
    assert asked == [("owner/base", "a" * 40, "model")]


def test_a_base_that_was_changed_or_is_another_is_refused(place: Path, pico_base: Path) -> None:
    weights = place / "base" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(BadData, match="was changed after it was written"):
        load_packaged(place / "models" / "reft")
    (place / "base" / "manifest.json").unlink()
    with pytest.raises(BadModel, match="refers to a base that is not where it was"):
        load_packaged(place / "models" / "reft")
    assert base_in(pico_base) == pico_base
