from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData
from tasks.engine.checkpoints import Checkpoint, check_structure, latest, save, structure_of


def checkpoint(step: int) -> Checkpoint:
    tensors = {"parameter/a": torch.full((3,), float(step)), "random/cpu": torch.get_rng_state()}
    return Checkpoint(step, tensors, [{"step": step}], [])


def test_the_newest_is_taken_and_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save(tmp_path, checkpoint(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert found.log == [{"step": 10}]
    assert torch.equal(found.tensors["parameter/a"], torch.full((3,), 10.0))


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-5]), flip])
def test_a_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], None]
) -> None:
    save(tmp_path, checkpoint(2))
    save(tmp_path, checkpoint(4))
    harm(tmp_path / "step-00000004" / name)
    found = latest(tmp_path)
    if found is not None and found.step == 4:
        # the one thing a flipped byte may do unnoticed is change what the manifest says beside the digests
        assert name == "manifest.json"
        assert torch.equal(found.tensors["parameter/a"], torch.full((3,), 4.0))
        return
    assert found is not None
    assert found.step == 2
    assert "passing over a damaged checkpoint" in capsys.readouterr().out


def test_optimizers_of_another_kind_or_shape_are_refused(tmp_path: Path) -> None:
    """The key of a checkpoint says nothing of the code: what it holds is held against what the training has."""

    def optimizers(kind: type[torch.optim.Optimizer], *groups: int) -> list[Any]:
        return [kind([{"params": [torch.zeros(2) for _ in range(count)]} for count in groups], lr=0.1)]  # type: ignore[call-arg]

    kept = checkpoint(2)._replace(optimizers=structure_of(optimizers(torch.optim.AdamW, 1, 2)))
    save(tmp_path, kept)
    found = latest(tmp_path)
    assert found is not None
    check_structure(found, optimizers(torch.optim.AdamW, 1, 2), "here")
    for other in (optimizers(torch.optim.SGD, 1, 2), optimizers(torch.optim.AdamW, 3), []):
        with pytest.raises(BadData, match="of another training"):
            check_structure(found, other, "here")


def test_a_state_of_another_version_is_refused_in_words(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "step-00000001") as folder:
        (folder / "state.json").write_text('{"step": 1}')
    with pytest.raises(BadData, match="one without log, optimizers, training"):
        latest(tmp_path)
