from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.run.lock import held
from flows.run.repair import keep_lock_copy, put_in_order
from tasks.core.errors import WorkspaceBusy
from tasks.core.pipeline import recorded_keys
from tests.conftest import DEAD, dvc, git
from tests.helpers.commands import environment

PIPELINE = """
stages:
  one:
    cmd: mkdir -p data && echo one > data/one
    params:
      - a
    outs:
      - data/one
  two:
    cmd: cp data/one two
    deps:
      - data/one
    outs:
      - two
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A workspace of two tiny stages that have run."""
    folder = tmp_path / "work space"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("a: 1\n")
    git(folder, "init", "--quiet")
    dvc(folder, "init", "--quiet")
    dvc(folder, "repro")
    put_in_order(folder)
    keep_lock_copy(folder)
    return folder


def test_a_workspace_in_order_is_left_alone(small: Path) -> None:
    before = (small / "dvc.lock").read_bytes()
    assert put_in_order(small) == []
    assert (small / "dvc.lock").read_bytes() == before


def test_a_torn_rwlock_is_removed(small: Path) -> None:
    (small / ".dvc" / "tmp" / "rwlock").write_text('{"/x": {"wri')
    dvc(small, "repro", code=255)  # DVC by itself is stuck until someone deletes it
    assert "rwlock" in put_in_order(small)[0]
    dvc(small, "repro")


def test_dvc_lock_cut_anywhere_is_mended(small: Path) -> None:
    whole = (small / "dvc.lock").read_bytes()
    for cut in range(0, len(whole), 7):
        (small / "dvc.lock").write_bytes(whole[:cut])
        done = put_in_order(small)
        mended = (small / "dvc.lock").read_bytes()
        # cut exactly between two stages it is a whole file, and the lost stage is restored by DVC
        kept = YAML(typ="safe").load(mended)["stages"]
        assert mended == whole or (not done and kept.items() <= YAML(typ="safe").load(whole)["stages"].items())
    (small / "dvc.lock").write_bytes(whole)


def test_a_torn_lock_is_never_kept_as_the_good_copy(small: Path) -> None:
    whole = (small / "dvc.lock").read_bytes()
    (small / "dvc.lock").write_bytes(whole[:150])  # DVC was killed while it wrote, and the run ends
    keep_lock_copy(small)
    put_in_order(small)
    assert (small / "dvc.lock").read_bytes() == whole


def test_without_a_copy_a_torn_lock_is_removed_and_dvc_restores_the_rest(small: Path) -> None:
    (small / "dvc.lock").write_bytes((small / "dvc.lock").read_bytes()[:150])
    (small / ".temper" / "dvc.lock.good").unlink()
    assert "removed dvc.lock" in put_in_order(small)[0]
    assert "cached - skipping run" in dvc(small, "repro")
    assert dvc(small, "status").strip() == "Data and pipelines are up to date."


def test_drafts_of_killed_writers_are_removed(small: Path) -> None:
    (small / "data" / f".base.draft-{DEAD}").mkdir()
    (small / ".temper" / "checkpoints" / "k").mkdir(parents=True)
    (small / ".temper" / "checkpoints" / "k" / f".step-1.draft-{DEAD}").mkdir()
    (small / ".temper" / f".note.draft-{os.getppid()}").touch()  # its writer is at work
    assert len(put_in_order(small)) == 2
    assert put_in_order(small) == []
    assert (small / ".temper" / f".note.draft-{os.getppid()}").exists()


@pytest.mark.parametrize("output_is_there", [True, False])
def test_a_flipped_byte_in_the_cache_never_reaches_a_stage(small: Path, output_is_there: bool) -> None:
    """DVC serves a damaged object without a word, and even puts it in the place of a right output."""
    (victim,) = (p for p in (small / ".dvc" / "cache" / "files" / "md5").glob("??/*") if p.read_text() == "one\n")
    name = victim.parent.name + victim.name
    victim.chmod(0o600)
    victim.write_text("ona\n")
    victim.chmod(0o444)
    if output_is_there:
        assert put_in_order(small) == [
            f"mended a damaged object of DVC's cache from the output that it was made of: {name}"
        ]
        assert victim.read_text() == "one\n"
        assert victim.stat().st_mode & 0o777 == 0o444
    else:
        (small / "data" / "one").unlink()
        (small / "two").unlink()
        assert put_in_order(small) == [f"removed a damaged object from DVC's cache: {name}"]
    dvc(small, "repro")
    assert (small / "data" / "one").read_text() == (small / "two").read_text() == "one\n"
    assert put_in_order(small) == []


def test_checkpoints_of_complete_stages_are_removed_and_others_stay(small: Path) -> None:
    key = recorded_keys(small)["one"]
    for name in (key, "0123456789abcdef"):
        (small / ".temper" / "checkpoints" / name).mkdir(parents=True)
    assert put_in_order(small) == []
    assert [p.name for p in (small / ".temper" / "checkpoints").iterdir()] == ["0123456789abcdef"]


def test_dvc_lock_is_not_read_while_dvc_writes_it(small: Path) -> None:
    """DVC rewrites it in place: whoever reads it then sees half of it."""
    script = """if True:
        import fcntl, sys, time
        lock = open(".dvc/tmp/lock", "r+")
        fcntl.flock(lock, fcntl.LOCK_EX)  # as zc.lockfile does for DVC
        whole = open("dvc.lock").read()
        open("dvc.lock", "w").write(whole[:100])
        print("cut", flush=True)
        time.sleep(0.5)
        open("dvc.lock", "w").write(whole)
        """
    keys = recorded_keys(small)
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=small, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "cut\n"
    assert recorded_keys(small) == keys
    assert writer.wait() == 0


HOLD = """
import sys, time
from pathlib import Path
from flows.run.lock import held
with held(Path(sys.argv[1]), "temper run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_one_is_told_who_holds_the_workspace_and_a_kill_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WorkspaceBusy) as caught, held(tmp_path, "another"):
        pass
    assert f"temper run (process {holder.pid}) holds the workspace since" in caught.value.what
    assert f"kill {holder.pid}" in caught.value.fix
    assert caught.value.exit_code == 75
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    freed = time.monotonic()
    with held(tmp_path, "another"):
        assert time.monotonic() - freed < 5
        assert json.loads((tmp_path / ".temper" / "lock.holder.json").read_text())["pid"] == os.getpid()


def test_what_holds_it_may_hold_it_again(tmp_path: Path) -> None:
    with held(tmp_path, "outer"), held(tmp_path, "inner"):
        assert json.loads((tmp_path / ".temper" / "lock.holder.json").read_text())["purpose"] == "outer"


def test_the_state_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    with held(tmp_path, "x"):
        assert (tmp_path / ".temper").stat().st_mode & 0o077 == 0
