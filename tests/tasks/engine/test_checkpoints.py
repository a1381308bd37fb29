from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tasks.engine.checkpoints import Checkpoint, latest, save


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step, {"parameter/a": torch.full((3,), float(step)), "random/cpu": torch.get_rng_state()}, [{"step": step}]
    )


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
