"""Questions out of row files: what params say that their columns mean, and what becomes of rows that are defective.

No defect is passed over in silence. What is left out or read by a rule is counted, by task:
`without_answer` (left out: the answer is null or empty, or nothing can be cut out of it), `several_answers` (any of
them is right), `duplicate_choices` (of a text that occurs twice either place is right), `empty_choices` (null ones at
the end are no choices), `numbered_from_1` (an answer that is a number, of a file whose first choice is 1),
`thousands_commas` and `negative_numbers` (in right answers, which are compared as numbers).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.artifacts import digest, digests
from tasks.core.errors import BadData, did_you_mean
from tasks.evaluate.answer_matching import extract_answer
from tasks.evaluate.suite_params import Choice, Generate, RowsPart
from tasks.readers.files import is_prose, read_rows_of
from tasks.readers.numbered_answers import number_of, numbered_from
from tasks.readers.text_files import FileRow

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Question(NamedTuple):
    """One question.

    Attributes:
        id: its own, or the number of its row.
        fields: by the names of params: texts, and lists of texts where a column holds or several columns make one.
        right: of multiple choice the places of the right choices.
        answers: right answers as text, the best of which counts.
    """

    id: str
    fields: Mapping[str, Any]
    right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()


class Task(NamedTuple):
    """The questions of one task, the solved ones that stand before each, and how many rows had which defect."""

    name: str
    questions: list[Question]
    shots: list[Question]
    counted: Mapping[str, int]


def read_tasks(part: RowsPart, limit: int | None, root: Path | None = None) -> list[Task]:
    """Read the tasks of row files, by name.

    Args:
        part: of params, or of a ready suite.
        limit: questions of each task, at most.
        root: what the paths are relative to.

    Raises:
        BadData: a file is missing, is not the one that params pin, matches nothing, or lacks a column; a row's answer
            is none of its choices; or no row of a task has an answer.
    """
    by_task = _rows(part.path, part.files, part.sha256, root)
    solved = {} if part.shots == "none" else _rows(part.shots.path, part.shots.files, part.shots.sha256, root)
    tasks = []
    for star, rows in sorted(by_task.items()):
        name, counted = part.task.replace("*", star), Counter[str]()
        questions = list(islice(_questions(part, rows, counted), limit))
        if not questions:
            raise BadData(
                "no row has an answer", where=rows[0].file, got=f"{len(rows)} rows", fix="name the split with answers"
            )
        tasks.append(Task(name, questions, _shots(part, star, solved, name), counted))
    return tasks


def _shots(part: RowsPart, star: str, solved: Mapping[str, list[FileRow]], task: str) -> list[Question]:
    if part.shots == "none":
        return []
    rows = solved.get(star) or solved.get("") or []
    found = list(islice(_questions(part, rows, Counter()), part.shots.count))
    if len(found) < part.shots.count:
        raise BadData(
            "there are too few solved questions",
            where=f"{part.shots.path}: {task}",
            got=str(len(found)),
            expected=f"{part.shots.count}, as params say",
        )
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def check_digest(path: Path, expected: str) -> None:
    """Refuse a file or folder that is not the one that was pinned.

    Raises:
        BadData: it is missing, or its digest is another.
    """
    if not path.exists():
        raise BadData("there is no such file or folder", where=str(path), fix="correct the path")
    if expected != "none" and (found := path_digest(path)) != expected:
        raise BadData(
            "is not the file that was pinned",
            where=str(path),
            got=f"sha256 {found}",
            expected=expected,
            fix="fetch it again, or pin this one",
        )


def path_digest(path: Path) -> str:
    """Compute the SHA-256 of a file; of a folder that of its files' names and digests."""
    import hashlib

    if path.is_file():
        return digest(path)
    lines = "".join(f"{name} {sha256}\n" for name, sha256 in digests(path).items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _rows(path: str, files: str, sha256: str, root: Path | None) -> dict[str, list[FileRow]]:
    """Read the rows of the files that match, by what `*` stands for."""
    place = (root / path) if root else Path(path)
    check_digest(place, sha256)
    pattern = re.compile(re.escape(files).replace(r"\*", "([^/]*)" if files != "*" else "(.*)"))
    by_star: dict[str, list[FileRow]] = {}
    seen = set[str]()
    for name, row in _named_rows(place, pattern):
        seen.add(name)
        if found := pattern.fullmatch(name):
            star = found.group(1) if "*" in files and files != "*" else ""
            by_star.setdefault(star, []).append(row)
    if not by_star:
        raise BadData("no file matches", where=str(place), got=", ".join(sorted(seen)[:5]), expected=files)
    return by_star


def _named_rows(place: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, FileRow]]:
    """Yield the rows of a file, an archive or a folder, each with its file's path in it."""
    if place.is_dir():
        for file in sorted(p for p in place.rglob("*") if p.is_file() and not is_prose(p.name)):
            name = file.relative_to(place).as_posix()
            if pattern.fullmatch(name):
                yield from ((name, row) for row in read_rows_of(file))
        return
    for row in read_rows_of(place):
        yield row.file.partition("!")[2] or place.name, row


# --- rows -------------------------------------------------------------------------------------------------------------


def _questions(part: RowsPart, rows: Sequence[FileRow], counted: Counter[str]) -> Iterator[Question]:
    metric = part.metric
    first = _first_number(part, rows) if isinstance(metric, Choice) else 0
    for row in rows:
        fields = {name: _field(row, columns) for name, columns in part.columns.items()}
        question = Question(_text(fields.get("id")) or str(row.number), fields)
        where = f"{row.file}:{row.number}"
        made: Question | None
        if isinstance(metric, Choice):
            made = _choices(question, metric, where, first, counted)
        elif metric.name in ("generate", "loglikelihood"):
            made = _answers(question, part, counted)
        else:
            made = question
        if made is None:
            counted["without_answer"] += 1
        else:
            yield made._replace(fields={**made.fields, "letters": LETTERS})


def _field(row: FileRow, columns: str | list[str]) -> Any:
    if not isinstance(row.value, Mapping):
        raise BadData("is not a row with columns", where=f"{row.file}:{row.number}", got=type(row.value).__name__)
    for column in [columns] if isinstance(columns, str) else columns:
        if column not in row.value:
            raise BadData(
                f'has no column "{column}"{did_you_mean(column, row.value)}',
                where=f"{row.file}:{row.number}",
                got=", ".join(map(str, row.value)),
            )
    if isinstance(columns, list):
        return [row.value[column] for column in columns]
    return row.value[columns]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _first_number(part: RowsPart, rows: Sequence[FileRow]) -> int:
    """Return the number of the first choice in these rows."""

    def answers() -> Iterator[tuple[Any, int]]:
        for row in rows:
            given, answer = (_field(row, part.columns[name]) for name in ("choices", "answer"))
            listed, named = _listed(given)
            choices = [_text(choice).strip() for choice in listed if choice not in (None, "")]
            for label in answer if isinstance(answer, list) else [answer]:
                if label not in (None, "") and _text(label).strip() not in [*choices, *named]:
                    yield label, len(choices)

    return numbered_from(answers(), part.numbered_from, rows[0].file)


def _listed(given: Any) -> tuple[list[Any], list[str]]:
    """Return choices and their own labels, which the datasets of the hub keep as {text, label}."""
    if isinstance(given, Mapping) and isinstance(given.get("text"), list) and isinstance(given.get("label"), list):
        return given["text"], [_text(label) for label in given["label"]]
    return (given, []) if isinstance(given, list) else ([], [])


def _choices(question: Question, metric: Choice, where: str, first: int, counted: Counter[str]) -> Question | None:
    given, named = _listed(question.fields["choices"])
    if not given:
        got = repr(question.fields["choices"])[:60]
        raise BadData("`choices` is no list", where=where, got=got, fix="name one column for each choice")
    while given and given[-1] in (None, ""):
        given, counted["empty_choices"] = given[:-1], counted["empty_choices"] + 1
    choices = [_text(choice).strip() for choice in given]
    answer = question.fields["answer"]
    labels = answer if isinstance(answer, list) else [answer]
    labels = [label for label in labels if label is not None and label != ""]
    if not labels:
        return None
    if len(choices) < 2 or len(choices) > len(LETTERS):
        raise BadData(f"has {len(choices)} choices", where=where, expected=f"2 to {len(LETTERS)}")
    right = [
        named.index(_text(label)) if _text(label) in named else _place(label, choices, metric, where, first)
        for label in labels
    ]
    counted["numbered_from_1"] += first == 1 and not named and any(number_of(label) is not None for label in labels)
    counted["several_answers"] += len(set(right)) > 1
    counted["duplicate_choices"] += len(set(choices)) < len(choices)
    if metric.endings != "letters":  # a letter names one place; the same text cannot be told apart
        right = [place for place, text in enumerate(choices) if any(text == choices[each] for each in right)]
    return question._replace(fields={**question.fields, "choices": choices}, right=tuple(sorted(set(right))))


def _place(label: Any, choices: Sequence[str], metric: Choice, where: str, first: int) -> int:
    """Return the place of the choice that a label names: by its number from the first, its letter, or its text."""
    text = _text(label).strip()
    letter = LETTERS.find(text.strip("().").upper()) if len(text.strip("().")) == 1 else -1
    by_letter = [letter] if 0 <= letter < len(choices) else []
    by_text = [choices.index(text)] if text in choices else []
    number = number_of(text)
    by_number = [number - first] if number is not None and 0 <= number - first < len(choices) else []
    if isinstance(label, int) and not isinstance(label, bool):
        found = by_number
    else:
        found = by_letter + by_text if metric.endings == "letters" else by_text + by_letter
        found = found or by_number
    if not found:
        raise BadData(
            "the answer is none of the choices",
            where=where,
            got=repr(label)[:80],
            expected=f"a number from {first} to {len(choices) - 1 + first}, "
            f"a letter up to {LETTERS[len(choices) - 1]}, or a choice's text",
        )
    return found[0]


def _answers(question: Question, part: RowsPart, counted: Counter[str]) -> Question | None:
    answer = question.fields["answer"]
    given = [_text(each) for each in (answer if isinstance(answer, list) else [answer])]
    if isinstance(part.metric, Generate):
        target = part.metric.target
        cut = [extract_answer(each, target) for each in given if each.strip()]
        given = [each for each in cut if each]
        if part.metric.match == "numeric":
            counted["thousands_commas"] += any(re.search(r"\d,\d", each) for each in given)
            counted["negative_numbers"] += any(each.lstrip("$").startswith(("-", "−")) for each in given)
    given = [each for each in given if each]
    counted["several_answers"] += len(set(given)) > 1
    return question._replace(answers=tuple(given)) if given else None
