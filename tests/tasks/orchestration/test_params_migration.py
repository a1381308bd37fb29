from __future__ import annotations

from pathlib import Path

import pytest

from flows.run.show_params import migrate_params, resolved
from tasks.core.errors import BadParams
from tasks.orchestration.params import load_params

OLD = """\
ingest: {sources: {mine: {kind: file, path: my.jsonl}}}
validate:
  leak_words: 15 # in a row
  checks:
    telephones: {action: repair, mostly: 0.5}
  duplicates: {exact: merge, near: warn}
base: {kind: local, path: models/tiny}

# the methods
train:
  mine:
    batch_rows: 16
    micro_batch_rows: 4 # of each process
    evaluation: {every_steps: 5, patience: 2}
merge: {probe_rows: 3}
promote: {max_leaked: 0.1}
"""
NEW = """\
ingest: {sources: {mine: {kind: file, path: my.jsonl}}}
validate:
  contamination_ngram: 15 # in a row
  checks:
    phone_numbers: {action: repair, mostly: 0.5}
  duplicates: {exact: drop, near: warn}
base: {kind: local, path: models/tiny}
train_defaults: {}

# the methods
train:
  mine:
    batch_size: 16
    micro_batch_size: 4 # of each process
    evaluation: {every_steps: 5, early_stopping_patience: 2}
merge: {probe_examples: 3}
promote: {max_contamination: 0.1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(OLD)
    return path


def test_old_words_are_refused_each_with_its_line_and_its_new_name(file: Path) -> None:
    with pytest.raises(BadParams) as caught:
        load_params(file)
    told = str(caught.value)
    for said in (
        "line 3: validate.leak_words -> validate.contamination_ngram",
        "line 5: validate.checks.telephones -> validate.checks.phone_numbers",
        "line 6: validate.duplicates.exact: merge -> drop",
        "line 12: train.mine.batch_rows -> train.mine.batch_size",
        "line 13: train.mine.micro_batch_rows -> train.mine.micro_batch_size",
        "line 14: train.mine.evaluation.patience -> train.mine.evaluation.early_stopping_patience",
        "line 15: merge.probe_rows -> merge.probe_examples",
        "line 16: promote.max_leaked -> promote.max_contamination",
        "temper params --migrate",
    ):
        assert said in told
    assert len(caught.value.examples) == 8


def test_an_old_file_is_rewritten_with_its_comments_and_kept(file: Path) -> None:
    migrate_params(file.parent)
    assert file.read_text() == NEW
    assert file.with_name("params.yaml.before").read_text() == OLD
    assert migrate_params(file.parent) == ([], "")


def test_every_value_is_told_with_its_origin(file: Path) -> None:
    file.write_text(NEW.replace("train_defaults: {}", "train_defaults: {seed: 5}"))
    found = {each.key: (each.value, each.origin) for each in resolved(file.parent)}
    assert found["train.mine.batch_size"] == (16, "params.yaml:13")
    assert found["train.mine.seed"] == (5, "train_defaults, params.yaml:8")
    assert found["train.mine.learning_rate"] == (2e-4, "default")
    assert found["evaluate.confidence"] == (0.95, "default")
    assert found["validate.checks.phone_numbers.mostly"] == (0.5, "params.yaml:5")
