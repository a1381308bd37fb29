from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import BadData, BadParams
from tasks.evaluate.task_files import read_task_file

GOOD = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{ question }}\\nAnswer:"
doc_to_target: "{{ gold }}"
doc_to_choice: "{{ choices }}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

HOSTILE = {
    "a function": GOOD.replace('"{{ gold }}"', "!function evil.target"),
    "a python object": GOOD.replace('"{{ gold }}"', "!!python/object/apply:os.system ['touch PWNED']"),
    "a python name": GOOD.replace('"{{ gold }}"', "!!python/name:os.system"),
    "an alias": GOOD + "metadata: &a {x: 1}\ntag: *a\n",
    "an include": GOOD + "include: other.yaml\n",
    "a class": GOOD + "class: evil.Task\n",
    "documents made by code": GOOD + "process_docs: evil.docs\n",
    "results made by code": GOOD + "process_results: evil.results\n",
    "a dataset made by code": GOOD + "custom_dataset: evil.data\n",
    "unsafe code": GOOD + "unsafe_code: true\n",
    "a metric of the hub": GOOD.replace("metric: acc,", "metric: lvwerra/evil, hf_evaluate: true,"),
    "a known metric fetched": GOOD.replace("metric: acc,", "metric: acc, hf_evaluate: true,"),
    "an aggregation of its own": GOOD.replace("aggregation: mean", "aggregation: evil.mean"),
    "a filter of its own": GOOD + "filter_list: [{name: f, filter: [{function: custom}]}]\n",
    "a file outside": GOOD.replace("rows.jsonl", "../outside.jsonl"),
    "an absolute file": GOOD.replace("rows.jsonl", "/etc/passwd"),
    "a dataset of the hub": GOOD.replace("dataset_kwargs: {data_files: {test: rows.jsonl}}", "dataset_kwargs: {}"),
    "code of a dataset": GOOD.replace("{data_files:", "{trust_remote_code: true, data_files:"),
    "an unknown key": GOOD.replace("test_split", "tset_split"),
    "nothing to measure": GOOD.partition("metric_list")[0],
    "a list": "- 1\n",
    "no yaml": "a: b: c\n",
}


def write(folder: Path, text: str) -> Path:
    (folder / "task").mkdir()
    (folder / "outside.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "gold": 0}\n')
    (folder / "task" / "rows.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "gold": 0}\n')
    (folder / "task" / "evil.py").write_text("import pathlib\npathlib.Path('PWNED').touch()\n")
    (folder / "task" / "mine.yaml").write_text(text)
    return folder / "task" / "mine.yaml"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_task_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadParams, BadData)) as refused:
        read_task_file(write(tmp_path, HOSTILE[name]))
    assert refused.value.exit_code == 65
    assert not (tmp_path / "PWNED").exists()


def test_a_misspelt_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match='tset_split: unknown key; did you mean "test_split"'):
        read_task_file(write(tmp_path, HOSTILE["an unknown key"]))


def test_a_plain_one_is_taken_with_its_rows(tmp_path: Path) -> None:
    task = read_task_file(write(tmp_path, GOOD))
    data = task.pop("custom_dataset")()
    assert data["test"][0] == {"question": "q", "choices": ["a", "b"], "gold": 0}
    assert task["task"] == "mine"
    assert not {"dataset_path", "dataset_kwargs"} & task.keys()
