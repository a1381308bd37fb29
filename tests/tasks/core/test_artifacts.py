from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tasks.core import artifacts
from tasks.core.artifacts import MANIFEST, atomic_folder, atomic_write, digest, digests, read_manifest
from tasks.core.errors import BadData
from tests.conftest import DEAD


def test_a_folder_appears_whole_with_the_digest_of_every_file(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", {"rows": 3}) as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "a.txt").write_text("hello")
        assert not (tmp_path / "out").exists()
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rows"] == 3
    assert manifest["files"] == {"deep/a.txt": {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5}}


def test_nothing_appears_when_the_work_fails_and_what_stood_there_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("old")

    def fail(folder: Path) -> None:
        with atomic_folder(folder) as draft:
            (draft / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "out") as draft:
            (draft / text).write_text(text)
    assert list(digests(tmp_path / "out")) == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".out.draft-{DEAD}").mkdir()
    (tmp_path / f".out.draft-{DEAD}" / "half").write_text("x")
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", "1")
    before = (tmp_path / "a.json").stat().st_ino
    atomic_write(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert (tmp_path / "a.json").stat().st_ino != before


@pytest.mark.parametrize("harm", ["flip", "remove", "add", "cut manifest", "no manifest"])
def test_an_altered_folder_is_refused(tmp_path: Path, harm: str) -> None:
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "a.bin").write_bytes(b"\x00" * 100)
        (draft / "b").write_text("b")
    folder = tmp_path / "out"
    if harm == "flip":
        (folder / "a.bin").write_bytes(b"\x00" * 50 + b"\x01" + b"\x00" * 49)
    elif harm == "remove":
        (folder / "b").unlink()
    elif harm == "add":
        (folder / "c").write_text("c")
    elif harm == "cut manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
    else:
        (folder / MANIFEST).unlink()
    with pytest.raises(BadData) as caught:
        read_manifest(folder)
    assert caught.value.exit_code == 65


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was just written is read again, since it could change within a tick of the disk's clock."""
    read: list[str] = []
    real = artifacts._digest

    def count(path: Path, algorithm: str) -> str:
        read.append(algorithm)
        return real(path, algorithm)

    monkeypatch.setattr(artifacts, "_digest", count)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert [digest(file), digest(file)] == [hashlib.sha256(b"one").hexdigest()] * 2
    assert len(read) == 2
    monkeypatch.setattr(artifacts, "_SETTLED_NS", 0)
    os.utime(file, ns=(0, 0))  # so that the next change has another time
    assert digest(file) == digest(file)
    assert len(read) == 3
    assert digest(file, "md5") == hashlib.md5(b"one").hexdigest()
    file.write_bytes(b"two")
    assert digest(file) == hashlib.sha256(b"two").hexdigest()
    assert read[3:] == ["md5", "sha256"]


def test_the_manifest_is_the_last_thing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its existence means complete: a failure while it is written leaves no folder."""
    import tasks.core.artifacts

    monkeypatch.setattr(tasks.core.artifacts, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("a")
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_gives_the_same_manifest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / name, {"b": 1, "a": "é"}) as draft:
            (draft / "x").write_text("x")
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()
    assert json.loads((tmp_path / "one" / MANIFEST).read_text())["a"] == "é"
