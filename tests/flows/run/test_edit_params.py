from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.run.edit_params import change_params
from tasks.core.errors import BadParams
from tasks.orchestration.params import load_params
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
COPIED = (ROOT / "params.yaml").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What change_params looks at: params.yaml, dvc.yaml, and the paths that they name."""
    (tmp_path / "params.yaml").write_text(COPIED)
    (tmp_path / "data").mkdir()
    for name in ("dvc.yaml", "data/lexicon.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "data" / "templates").mkdir()
    (tmp_path / "data" / "suites").mkdir()
    (tmp_path / "data" / "expectations").mkdir()
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    for name in ("models/tiny", "a b/c"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_one_value_changes_and_every_comment_stays(folder: Path) -> None:
    difference = change_params(folder, None, ["validate.max_quarantined=0.25"])
    before, after = COPIED.splitlines(), (folder / "params.yaml").read_text().splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [
        (
            "  max_quarantined: 0.01 # the stage fails when a larger share of all rows goes to quarantine",
            "  max_quarantined: 0.25 # the stage fails when a larger share of all rows goes to quarantine",
        )
    ]
    assert [line for line in difference.splitlines() if line.startswith(("+ ", "- "))] == [
        f"-{changed[0][0]}",
        f"+{changed[0][1]}",
    ]
    assert load_params(folder / "params.yaml").validate_.max_quarantined == 0.25


@pytest.mark.parametrize(
    ("setting", "added"),
    [
        ("train.orpo.objective.weight=0.25", ["      weight: 0.25"]),
        ("train.orpo.adapter.rank=4", ["    adapter:", "      rank: 4", "      name: qlora"]),
        ("train_defaults.epochs=3", ["  epochs: 3"]),
        ("promote.floors={held_out: 0.5}", ["  floors:", "    held_out: 0.5"]),
        ("validate.checks.emails.action=repair", ["  checks:", "    emails:", "      action: repair"]),
    ],
)
def test_a_key_that_the_file_leaves_out_is_put_into_its_section(folder: Path, setting: str, added: list[str]) -> None:
    change_params(folder, None, [setting])
    after = (folder / "params.yaml").read_text().splitlines()
    start = after.index(added[0])
    assert after[start : start + len(added)] == added
    assert after[:start] + after[start + len(added) :] == COPIED.splitlines()
    load_params(folder / "params.yaml")


def test_values_are_yaml(folder: Path) -> None:
    change_params(
        folder, None, ["train.reft.adapter.layers=[0, 2]", "train.qlora.learning_rate=1e-4", "base.path=a b/c"]
    )
    params = load_params(folder / "params.yaml")
    assert params.train["reft"].adapter.layers == [0, 2]  # type: ignore[union-attr]
    assert params.train["qlora"].learning_rate == 1e-4
    assert params.base.path == "a b/c"


def test_a_recipe_takes_the_place_and_the_old_file_is_kept(folder: Path, tmp_path: Path) -> None:
    own = COPIED.replace("temper-tiny", "mine")
    (folder / "params.yaml").write_text(own)
    assert change_params(folder, QUICKSTART, [])
    assert (folder / "params.yaml").read_text() == COPIED
    assert (folder / "params.yaml.before").read_text() == own


def test_nothing_to_change_is_nothing_written(folder: Path) -> None:
    before = (folder / "params.yaml").stat().st_mtime_ns
    assert change_params(folder, None, []) == ""
    assert change_params(folder, QUICKSTART, []) == ""
    assert (folder / "params.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.orpo.epoch=2", 'no key "epoch"; did you mean "epochs"?'),
        ("trian.orpo.epochs=2", 'did you mean "train"?'),
        ("train.orpo.epochs.deep=2", "no key"),
        ("train.orpo.epochs", "is not a setting"),
        ("train.orpo.epochs=0", "greater than or equal to 1"),
        ("train.orpo.epochs=[1", "not YAML"),
        ("base.path=models/tinny", "models/tinny"),
    ],
)
def test_a_bad_setting_changes_nothing(folder: Path, setting: str, said: str) -> None:
    with pytest.raises(BadParams) as caught:
        change_params(folder, None, ["register.model=other", setting])
    assert said in str(caught.value)
    assert (folder / "params.yaml").read_text() == COPIED
    assert not (folder / "params.yaml.before").exists()


def test_a_missing_recipe_changes_nothing(folder: Path) -> None:
    with pytest.raises(BadParams, match="cannot be read"):
        change_params(folder, folder / "nothing.yaml", [])
    assert (folder / "params.yaml").read_text() == COPIED
