from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.core.artifacts import digest
from tasks.core.errors import BadData
from tasks.evaluate.questions import Task, path_digest, read_tasks
from tasks.evaluate.suite_params import RowsPart
from tasks.evaluate.suites import shipped
from tests.helpers.samples import CHOICE, MULTIPLE, rows_suite, write_lines

LETTERED = {**CHOICE, "endings": "letters"}
NUMERIC = {"name": "generate", "extract": "last_number", "target": "last_number", "match": "numeric", "stop": []}


def one(folder: Path, metric: dict[str, Any], *rows: dict[str, Any], **changes: Any) -> Task:
    columns = MULTIPLE if metric["name"] == "choice" else {"question": "question", "answer": "answer"}
    (task,) = read_tasks(rows_suite(write_lines(folder / "rows.jsonl", list(rows)), metric, columns, **changes), None)
    return task


def asked(answer: Any, choices: Any = ("x", "y", "z")) -> dict[str, Any]:
    return {"question": "q", "choices": list(choices) if isinstance(choices, tuple) else choices, "answer": answer}


@pytest.mark.parametrize(
    ("answer", "right"),
    [(0, (0,)), (2, (2,)), ("B", (1,)), ("(c)", (2,)), ("y", (1,)), (["A", "C"], (0, 2)), ([2], (2,))],
)
def test_an_answer_is_a_number_a_letter_a_text_or_several(tmp_path: Path, answer: Any, right: tuple[int, ...]) -> None:
    (question,) = one(tmp_path, CHOICE, asked(answer)).questions
    assert question.right == right


ARC = ({"text": ["iron", "oak", "wool"], "label": ["1", "2", "3"]}, "2")
"""As the hub has it: choices with labels of their own, by which the answer goes."""


def test_numbers_are_read_alike_in_a_whole_file(tmp_path: Path) -> None:
    assert [q.right for q in one(tmp_path, CHOICE, asked("1"), asked("3")).questions] == [(0,), (2,)]
    assert [q.right for q in one(tmp_path, CHOICE, asked("1"), asked("0")).questions] == [(1,), (0,)]
    assert [q.right for q in one(tmp_path, CHOICE, asked("1"), asked("B")).questions] == [(0,), (1,)]
    assert one(tmp_path, CHOICE, asked("1"), numbered_from=0).questions[0].right == (1,)
    assert one(tmp_path, CHOICE, asked(ARC[1], ARC[0])).questions[0].right == (1,)
    with pytest.raises(BadData, match="numbered from 0 or from 1"):
        one(tmp_path, CHOICE, asked("1"), asked("2"))
    with pytest.raises(BadData, match="none of the choices"):
        one(tmp_path, CHOICE, asked("0"), numbered_from=1)
    assert one(tmp_path, CHOICE, asked("1"), asked("3")).counted["numbered_from_1"] == 2


def test_a_letter_that_is_a_choice_itself_means_what_the_metric_asks_for(tmp_path: Path) -> None:
    rows = asked("A", ("B", "A"))
    assert one(tmp_path, CHOICE, rows).questions[0].right == (1,)
    assert one(tmp_path, LETTERED, rows).questions[0].right == (0,)


def test_defects_are_counted(tmp_path: Path) -> None:
    rows = [
        asked("A"),
        asked(None),
        asked(""),
        asked([]),
        asked(["A", "B"]),
        asked("B", ("x", "x", "z")),
        asked("A", ("x", "y", None)),
    ]
    task = one(tmp_path, CHOICE, *rows)
    assert Counter(task.counted) == Counter(without_answer=3, several_answers=1, duplicate_choices=1, empty_choices=1)
    assert [q.right for q in task.questions] == [(0,), (0, 1), (0, 1), (0,)]  # either place of the same text
    assert [q.id for q in task.questions] == ["1", "5", "6", "7"]
    assert one(tmp_path, LETTERED, rows[5]).questions[0].right == (1,)  # a letter names one place


def test_numbers_with_commas_and_signs_are_counted_and_cut_out(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": f"so\n#### {value}"} for value in ("5", "70,000", "-3", "x")]
    task = one(tmp_path, {**NUMERIC, "target": {"regex": "#### *(.+)"}}, *rows)
    assert [q.answers for q in task.questions] == [("5",), ("70,000",), ("-3",), ("x",)]
    assert Counter(task.counted) == Counter(thousands_commas=1, negative_numbers=1)
    assert Counter(one(tmp_path, NUMERIC, *rows).counted)["without_answer"] == 1  # no number in "x"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (asked("D"), "the answer is none of the choices"),
        (asked(7), "the answer is none of the choices"),
        (asked("no such text"), "the answer is none of the choices"),
        (asked(0, ("x",)), "has 1 choices"),
        (asked(0, "xyz"), "`choices` is no list"),
        ({"question": "q", "choices": ["a", "b"], "anwser": 0}, 'has no column "answer"; did you mean "anwser"'),
    ],
)
def test_a_row_that_no_rule_covers_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadData, match=said) as refused:
        one(tmp_path, CHOICE, asked(0), row)
    assert "rows.jsonl:2" in refused.value.where


def test_a_split_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no row has an answer"):
        one(tmp_path, CHOICE, asked(None), asked(None))


def exams(folder: Path) -> Path:
    """An archive laid out like C-Eval's."""
    path = folder / "exams.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("art", "law"):
            for split, rows in (("dev", 2), ("val", 3)):
                lines = [f"{n},q{n} of {subject},1,2,A" for n in range(rows)]
                archive.writestr(f"{split}/{subject}_{split}.csv", "\n".join([",question,A,B,answer", *lines]) + "\n")
            archive.writestr(f"test/{subject}_test.csv", ",question,A,B\n0,q,1,2\n")
    return path


def exam_part(path: Path, **changes: Any) -> RowsPart:
    shots = {"count": 2, "path": str(path), "files": "dev/*_dev.csv", "sha256": "none"}
    columns = {"question": "question", "choices": ["A", "B"], "answer": "answer"}
    given = {"files": "val/*_val.csv", "task": "*", "shots": shots, **changes}
    return rows_suite(path, LETTERED, columns, **given)


def test_subjects_of_an_archive_are_tasks_with_shots_of_their_own(tmp_path: Path) -> None:
    tasks = read_tasks(exam_part(exams(tmp_path)), 2)
    assert [task.name for task in tasks] == ["art", "law"]
    for task in tasks:
        assert [q.fields["question"] for q in task.questions] == [f"q0 of {task.name}", f"q1 of {task.name}"]
        assert [q.fields["question"] for q in task.shots] == [f"q0 of {task.name}", f"q1 of {task.name}"]
        assert task.questions[0].fields["choices"] == ["1", "2"]


def test_the_same_files_in_a_folder_are_the_same_tasks(tmp_path: Path) -> None:
    archive = exams(tmp_path)
    zipfile.ZipFile(archive).extractall(tmp_path / "folder")
    part = exam_part(tmp_path / "folder", shots="none")
    assert read_tasks(part, None) == read_tasks(exam_part(archive, shots="none"), None)


def test_what_does_not_fit_the_files_is_refused(tmp_path: Path) -> None:
    path = exams(tmp_path)
    with pytest.raises(BadData, match="no file matches"):
        read_tasks(exam_part(path, files="valid/*.csv"), None)
    shots = {"count": 9, "path": str(path), "files": "dev/*_dev.csv", "sha256": "none"}
    with pytest.raises(BadData, match="too few solved questions"):
        read_tasks(exam_part(path, shots=shots), None)
    with pytest.raises(BadData, match="no such file"):
        read_tasks(exam_part(tmp_path / "none.zip", shots="none"), None)
    with pytest.raises(ValidationError, match=r"needs columns\.answer"):
        rows_suite(path, CHOICE, {"choices": "choices"})


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a" / "rows.jsonl", [asked(0)])
    pinned = digest(path)
    assert path_digest(path) == pinned
    before = path_digest(path.parent)
    part = rows_suite(path, CHOICE, MULTIPLE, sha256=pinned)
    assert len(read_tasks(part, None)[0].questions) == 1
    write_lines(path, [asked(1)])
    assert path_digest(path.parent) != before
    with pytest.raises(BadData, match="is not the file that was pinned") as refused:
        read_tasks(part, None)
    assert digest(path) in refused.value.got


# --- the defects that real files have, as they were counted -----------------------------------------------------------


def counted(real_data: Path, suite: str) -> Counter[str]:
    found = Counter[str]()
    for part in shipped(suite).parts:
        if isinstance(part, RowsPart) and (real_data / part.path).exists():
            for task in read_tasks(part, None, real_data):
                found.update(task.counted)
                found[f"rows of {task.name}"] = len(task.questions)
    return found


def test_defects_of_gsm8k(real_data: Path) -> None:
    found = counted(real_data, "gsm8k")
    assert found["rows of gsm8k"] == 1319
    assert (found["thousands_commas"], found["negative_numbers"]) == (14, 2)


def test_defects_of_agieval(real_data: Path) -> None:
    found = counted(real_data, "agieval")
    assert [found[f"rows of {n}"] for n in ("sat-math", "logiqa-zh", "gaokao-physics", "gaokao-mathcloze")] == [
        220, 651, 200, 118,
    ]  # fmt: skip
    assert found["several_answers"] == 35  # labels that are lists; those of the cloze task are null, and not read


def test_defects_of_the_chinese_exams(real_data: Path) -> None:
    found = counted(real_data, "ceval")
    assert sum(count for name, count in found.items() if name.startswith("rows of")) == 1346
    assert len([name for name in found if name.startswith("rows of")]) == 52
    assert found["duplicate_choices"] > 0
    found = counted(real_data, "cmmlu")
    assert sum(count for name, count in found.items() if name.startswith("rows of")) == 11582
    assert len([name for name in found if name.startswith("rows of")]) == 67


def test_other_ready_suites_read_what_is_there(real_data: Path) -> None:
    assert counted(real_data, "reft_commonsense")["rows of boolq"] == 3270
    arithmetic = counted(real_data, "reft_arithmetic")
    assert (arithmetic["rows of MultiArith"], arithmetic["rows of SVAMP"]) == (600, 1000)
    assert counted(real_data, "llm_foundry")["rows of winograd_wsc"] == 273
